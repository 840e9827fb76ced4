"""The metrics of the EMA while it is trained, by the code of tools/fid.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sra_jax import remote
from sra_jax.config.profiles import TEACHER
from sra_jax.data import registry as datasets
from sra_jax.errors import UserError
from sra_jax.evaluation import evaluate, record
from sra_jax.evaluation.reference import Reference, load_reference, parts_of
from sra_jax.evaluation.samples import SEED, Samples, extractor_for, open_reference, write_result
from sra_jax.runs import latent_means
from sra_jax.sampling.generation import Generator

LABELS = "balanced"


class TrainingEvaluation:
    """Metrics of the EMA while training (`config.evaluation`), with the code of tools/fid.py.

    Args:
      config: the run's.
      mesh: its devices.
      workdir: its folder.
      class_names: of its training set, one a label, or None.

    Raises:
      UserError: weights or reference are missing, or too few samples are asked for.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, workdir: Path, class_names: Sequence[str] | None):
        settings = config.evaluation
        self._config, self._count, self._workdir = config, settings.num_samples, remote.path(workdir)
        self._generator = Generator(
            config, mesh, datasets.decoder(config.data), settings.batch_size, SEED, latent_means.read(config, workdir)
        )
        self._ema = config.ema.sampled
        self._leads = jax.process_index() == 0
        if not self._leads:
            return
        reference = open_reference(settings.reference, config.data, labelled=settings.extractor == "classifier")
        self._extractor, found = extractor_for(settings.extractor, settings.weights or None, reference)
        reference = reference if found is None else found
        parts = parts_of(reference, self._extractor)
        self._metrics = evaluate.default_metrics(self._extractor, labels=True, parts=parts)
        self._translation = None
        if "accuracy" in self._metrics:
            self._translation = evaluate.label_translation(
                self._extractor, class_names, config.data.num_classes, "the training set"
            )
        if self._count < evaluate.least_samples(self._metrics):
            raise UserError(
                f"evaluation.num_samples={self._count}: {', '.join(self._metrics)} need at least "
                f"{evaluate.least_samples(self._metrics)}"
            )
        self._reference: Reference = load_reference(reference, self._extractor)

    def measure(self, ema: Mapping[str, Any], step: int) -> dict[str, float]:
        """The metrics of the EMA at this step, also written to evaluation/step_*.json. Empty but on process 0."""
        params = {"model": ema["model"]}
        weights = "ema" if self._ema == TEACHER else f"ema {self._ema}"
        made = record.of_model(self._config, step, weights, record.params_checksum(params), self._generator)
        if not self._leads:  # generating is everybody's work, measuring process 0's
            for _ in self._generator.images(params, self._count, LABELS):
                pass
            return {}
        samples = Samples(self._generator, params, self._count, LABELS, self._extractor, folder=None)
        result = evaluate.measure_features(
            samples.features(f"evaluating step {step}"), self._reference, self._extractor, metrics=self._metrics,
            image_size=self._generator.image_size(), translation=self._translation,
        )  # fmt: skip
        described, settings = self._generator.describe(), self._config.evaluation
        result = {"step": step, "labels": LABELS, "sampling": described, **result}
        if self._ema != TEACHER:
            result["ema"] = self._ema
        result[record.NAME] = {
            "given": {
                "workdir": str(self._workdir), "step": step, "tree": "ema", "ema": self._ema, "labels": LABELS,
                "num_samples": self._count, "sampling_batch_size": settings.batch_size,
                "reference": settings.reference, "extractor": settings.extractor, "weights": settings.weights or None,
                "metrics": list(self._metrics), **record.given_sampling(described),
            },
            **made, **record.of_measurement(self._extractor, self._reference),
        }  # fmt: skip
        write_result(self._workdir, step, result)
        return {name: float(result[name]) for name in self._metrics}
