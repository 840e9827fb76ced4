"""What is measured of a study's cell at one step, and with what: the same samples' noise, reference and examples for
all cells."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax import files
from sra_jax.data.dataset import Dataset
from sra_jax.distributed import sharding
from sra_jax.errors import Busy, UserError
from sra_jax.evaluation import evaluate
from sra_jax.evaluation.extractors import classifier_path
from sra_jax.evaluation.reference import load_reference, parts_of, save_reference, stored_metadata
from sra_jax.evaluation.samples import SEED, Samples, extractor_for, open_reference, unfinished_folder
from sra_jax.inspection import held_out
from sra_jax.inspection.probe import Schedule
from sra_jax.inspection.tokens import Settings, check_condition
from sra_jax.methods.registry import NONE, build
from sra_jax.runs import metrics
from sra_jax.runs.trained import TrainedModel
from sra_jax.sampling.generation import generator_of
from sra_jax.training.step import draw, total_loss

EXTRACTOR, REFERENCE = "extractor.safetensors", "reference.npz"
LABELS = "balanced"
WANTED = ("fid", "fid_infinity", "kid", "precision", "recall", "accuracy")
LOSS_EXAMPLES = 2048
LOSS_BATCH = 256
LOSS_SEED = 0


@dataclasses.dataclass(frozen=True)
class Probe:
    """How a cell's features are probed at its last step.

    Attributes:
      levels: noise levels, 0 to 1.
      examples: of the training set that train it; 0: all.
      tests: examples that test it; 0: all that are held out.
      epochs: of its training.
    """

    levels: tuple[float, ...]
    examples: int
    tests: int
    epochs: int = 80

    def check(self, configs: Iterable[ConfigDict]) -> None:
        """Raises `UserError` where a run of these configs cannot be probed so."""
        for config in configs:
            self.settings(config.model.depth)
            check_condition("null", config)

    def settings(self, depth: int) -> Settings:
        """Of all blocks, under the null label."""
        settings = Settings(tuple(range(1, depth + 1)), self.levels)
        settings.check(depth)
        return settings


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How cells are measured: two cells compare where this is equal.

    Attributes:
      steps: at which.
      sampling: the sampler with all its values and the seed of its noise.
      labels: the scheme of the samples' classes.
      num_samples: how many.
      metrics: of the samples.
      extractor: identity of the network that makes features of images.
      reference: name of the reference set.
      reference_count: how many images it has.
      loss_examples: on how many examples the EMA's denoising loss is taken.
      probe: how features are probed.
      test_path: `data.path` of what is held out.
    """

    steps: tuple[int, ...]
    sampling: dict[str, Any]
    labels: str
    num_samples: int
    metrics: tuple[str, ...]
    extractor: str
    reference: str
    reference_count: int | None
    loss_examples: int
    probe: Probe | None
    test_path: str | None

    @classmethod
    def of(
        cls, config: ConfigDict, instruments: "Instruments", steps: Sequence[int], probe: Probe | None,
        test_path: str | None,
    ) -> "Protocol":
        """Of a recipe: its `sampling` and `evaluation` sections say how."""
        sampling = {key: value for key, value in config.sampling.items() if not key.startswith("preview_")}
        return cls(
            tuple(steps), {**sampling, "seed": SEED}, LABELS, config.evaluation.num_samples, instruments.metrics,
            instruments.extractor.identity, instruments.reference.name, instruments.reference.count, LOSS_EXAMPLES,
            probe, test_path,
        )  # fmt: skip

    def data(self) -> dict[str, Any]:
        """As JSON data."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def key(self) -> str:
        """16 hexadecimal digits that tell two protocols apart."""
        return hashlib.sha256(json.dumps(self.data(), sort_keys=True).encode()).hexdigest()[:16]


class Instruments:
    """The extractor and the reference of a study, made once and kept in its folder.

    Args:
      config: a recipe whose `evaluation` section names them.
      output: the study's folder.

    Attributes:
      extractor: makes features of images.
      reference: with as many features as there are samples.
      metrics: those of WANTED that the two can give.

    Raises:
      UserError: weights or reference are missing, or too few samples are asked for.
    """

    def __init__(self, config: ConfigDict, output: Path):
        wanted = config.evaluation
        source = open_reference(wanted.reference, config.data, labelled=wanted.extractor == "classifier")
        kept, stored = output / EXTRACTOR, output / REFERENCE
        weights = wanted.weights or (str(kept) if wanted.extractor == "classifier" and kept.exists() else None)
        self.extractor, found = extractor_for(wanted.extractor, weights, source)
        source = source if found is None else found
        if wanted.extractor == "classifier" and not kept.exists():
            _copy(Path(weights) if weights else classifier_path(self.extractor.identity.split("/")[1]), kept)
        if stored.exists():
            metadata = stored_metadata(stored)
            if metadata is None or metadata.extractor != self.extractor.identity:
                raise UserError(
                    f"{stored} is of another extractor than {self.extractor.identity}: delete it, and it is made anew"
                )
            self.reference = load_reference(stored, self.extractor)
        else:
            self.reference = load_reference(source, self.extractor)
            if self.reference.features is not None:
                count = min(len(self.reference.features), config.evaluation.num_samples)
                chosen = np.linspace(0, len(self.reference.features) - 1, count).round().astype(int)
                self.reference = dataclasses.replace(self.reference, features=self.reference.features[chosen])
            save_reference(self.reference, stored)
        possible = parts_of(stored, self.extractor)
        self.metrics = tuple(
            name for name in WANTED
            if evaluate.METRICS[name][1] in self.extractor.outputs and evaluate.METRICS[name][2] in (None, *possible)
            and (name != "accuracy" or self.extractor.predicts_labels)
        )  # fmt: skip
        if wanted.num_samples < evaluate.least_samples(self.metrics):
            raise UserError(
                f"evaluation.num_samples={wanted.num_samples}: {', '.join(self.metrics)} need at least "
                f"{evaluate.least_samples(self.metrics)}"
            )


def _copy(source: Path, target: Path) -> None:
    with files.whole(target) as unfinished:
        shutil.copyfile(source, unfinished)


def measured_at(workdir: Path, step: int, protocol: Protocol, instruments: Instruments) -> dict[str, Any]:
    """All that is measured of a run at a step; read where an earlier attempt has it.

    Args:
      workdir: a run with a checkpoint of the step.
      step: which.
      protocol: how.
      instruments: with what.

    Returns:
      JSON data: `step`, the metrics by name, `denoising` (the EMA's loss on held-out examples, the same noise for all),
      `health` (of the nearest logged step before) and, at the last step, `probe` (levels, blocks).
    """
    path = workdir / "evaluation" / f"study_{step:07d}_{protocol.key()}.json"
    if path.exists():
        return json.loads(files.read_text(path))
    model = TrainedModel(workdir, step, sampling={})
    generator = generator_of(model, model.config.evaluation.batch_size, SEED)
    point: dict[str, Any] = {"step": step}
    folder = unfinished_folder(workdir, {"step": step, "protocol": protocol.data()})
    samples = Samples(generator, model.params, protocol.num_samples, LABELS, instruments.extractor, folder)
    translation = None
    if "accuracy" in protocol.metrics:
        translation = evaluate.label_translation(
            instruments.extractor, model.class_names, model.config.data.num_classes, str(workdir)
        )
    with samples.locked():
        result = evaluate.measure_features(
            samples.features(f"{workdir.name}, step {step}"), instruments.reference, instruments.extractor,
            metrics=protocol.metrics, image_size=generator.image_size(), translation=translation,
        )  # fmt: skip
        point |= {name: result[name] for name in (*protocol.metrics, "kid_std") if name in result}
        dataset = held_out.open_set(model, protocol.test_path or model.config.data.path)
        point["denoising"] = denoising_loss(model, dataset, held_out=protocol.test_path is not None)
        point["health"] = health_before(workdir, step)
        if protocol.probe is not None and step == protocol.steps[-1]:
            accuracy = held_out.probe_run(
                model, workdir / "features", protocol.probe.settings(model.config.model.depth),
                Schedule(epochs=protocol.probe.epochs), test_path=protocol.test_path,
                num_examples=protocol.probe.examples, num_tests=protocol.probe.tests, name=workdir.name,
            )  # fmt: skip
            point["probe"] = accuracy.round(6).tolist()
        files.write_text(path, json.dumps(point, indent=1) + "\n")
        samples.forget()
    return point


def health_before(workdir: Path, step: int) -> dict[str, float]:
    """The alignment's health as the run logged it last at or before a step: cosines, ranks, and the methods' losses."""
    logged = [record for record in metrics.read(workdir) if record["step"] <= step and "loss_denoising" in record]
    if not logged:
        return {}
    return {
        key: float(f"{value:.6g}") for key, value in logged[-1].items()
        if key.endswith(("/cosine", "_rank", "/loss")) or key == "loss_alignment"
    }  # fmt: skip


def denoising_loss(model: TrainedModel, dataset: Dataset, held_out: bool) -> float:
    """The mean denoising loss of a model on fixed examples under fixed noise at fixed times, with their labels.

    Args:
      model: the trained model.
      dataset: of the examples.
      held_out: whether these are no training examples; else a fifth of them that probes leave out, too, is taken.
    """
    config, process = model.config, config_lib.process_of(model.config)
    shape, baseline = config_lib.transformer_of(config), build(NONE, {})
    count = len(dataset.source)
    chosen = np.arange(count) if held_out else split_tests(count)
    size = -(-min(LOSS_BATCH, len(chosen)) // model.mesh.size) * model.mesh.size
    chosen = np.resize(chosen, max(size, min(LOSS_EXAMPLES, len(chosen)) // size * size))

    @jax.jit
    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        x0 = dataset.encode(batch, jax.random.fold_in(key, 1))
        example = draw(jax.random.fold_in(key, 0), x0, batch, process, baseline, shape, label_dropout=0.0)
        return total_loss(params, params, example, {}, networks=model.networks, process=process, methods=baseline)[0]

    losses = []
    for number, start in enumerate(range(0, len(chosen), size)):
        examples = [dataset.source[int(index)] for index in chosen[start : start + size]]
        batch = {name: np.stack([np.asarray(example[name]) for example in examples]) for name in examples[0]}
        key = jax.random.fold_in(jax.random.key(LOSS_SEED), number)
        losses.append(float(loss(model.params, sharding.put_rows(batch, model.mesh), key)))
    return float(f"{np.mean(losses):.8g}")


def split_tests(count: int) -> np.ndarray:
    """The examples that no probe is trained on, where no other set is held out."""
    return held_out.split(count, tested=False)[1]


@contextlib.contextmanager
def waited_for(path: Path, seconds: float) -> Iterator[None]:
    """`files.locked_output`, waiting for whoever writes it now."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(files.locked_output(path, "try again"))
                break
            except Busy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield
