"""What goes to Hugging Face beside a run's weights: its config without what is its owner's alone, and a model card."""

import contextlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax import files, remote
from sra_jax.config.profiles import TEACHER
from sra_jax.data import shards
from sra_jax.errors import UserError
from sra_jax.methods.registry import METHODS, NONE
from sra_jax.runs.state import Networks

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"

PLACE = "OWNER/NAME"
"""What the card calls the repository that it is uploaded to."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)*")
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
TASKS = ("unconditional-image-generation", "text-to-image")
"""What Hugging Face calls it: of classes, of captions."""

KEYS = frozenset({"process", "model", "alignment", "data", "sampling"})
"""Groups that tell a config of this project from another's config.json."""


def publishable(config: ConfigDict) -> ConfigDict:
    """A run's config without paths, without EMAs that the file lacks, and with the name of the autoencoder."""
    config = config.copy_and_resolve_references()
    vae = config.data.vae
    if not vae and config.data.name == "latents" and config.data.path:
        with contextlib.suppress(UserError):  # the latents need not be here
            vae = shards.read_manifest(config.data.path).vae_name
    with config.unlocked():
        config.data.vae = vae if _public(vae) else ""
        if "text_encoder" in config.data and not _public(config.data.text_encoder):
            config.data.text_encoder = ""
        config.data.path = config.init_from = config.compilation_cache = config.evaluation.weights = ""
        config.evaluation.reference = "dataset"
        config.ema.profiles, config.ema.sampled = "", TEACHER
    return config.lock()


def _public(name: str) -> bool:
    """Whether a model is named by an id of Hugging Face, and not by a path of its owner's."""
    return remote.scheme(name) == remote.HUB or HUB_ID.fullmatch(name) is not None


def config_beside(checkpoint: str) -> ConfigDict | None:
    """The config that was published beside a file of weights; None where there is none of this project's."""
    try:
        text = files.read_text(files.local(remote.beside(checkpoint, CONFIG_FILE)))
        values = json.loads(text)
        return config_lib.from_json(text) if isinstance(values, dict) and values.keys() >= KEYS else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None


def results(workdir: Path, step: int) -> list[dict[str, Any]]:
    """What tools/fid.py measured of a step, oldest first."""
    folder, found = workdir / "evaluation", []
    if not files.exists(folder):
        return []
    for path in sorted(folder.glob(f"step_{step:07d}*.json")):
        with contextlib.suppress(ValueError, OSError, UserError):
            result = json.loads(files.read_text(path))
            if isinstance(result, dict) and any(name in result for name in METRICS):
                found.append(result)
    return found


def text(
    config: ConfigDict, step: int, weights: str, ema: str, loaded_by: str, measured: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The model card, Markdown with the front matter that Hugging Face reads.

    Args:
      config: as `publishable` gives it.
      step: of the checkpoint.
      weights: "ema" or "params".
      ema: the name of the EMA, empty for the teacher's.
      loaded_by: which of the authors' classes take the file.
      measured: as `results` gives it.
    """
    methods, network = config_lib.methods_of(config), config_lib.transformer_of(config)
    captions = config_lib.tells_captions(config)
    shapes = jax.eval_shape(Networks(config).init, jax.random.key(0))["model"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    family = "MMDiT" if captions else "SiT" if config.process.name == "interpolant" else "DiT"
    told = "captions" if captions else f"{config.data.num_classes} classes"
    kind = "latents" if config.data.name in ("latents", "synthetic") else "pixels"
    tags = ["diffusion", family.lower(), "jax", *(part.name for part in methods)]
    facts = {
        "network": f"{family}, {network.depth} blocks, width {network.width}, {network.heads} heads, patch "
        f"{network.patch}; {count / 1e6:.1f}M parameters",
        "input": f"{network.input_size}x{network.input_size}x{network.channels} {kind}, {told}",
        "weights": f"the {'EMA ' + (ema or TEACHER) if weights == 'ema' else 'parameters'} of step {step:,}",
        "batch size": f"{config.batch_size}; {step * config.batch_size:,} examples seen",
        "optimizer": f"AdamW, learning rate {config.optimizer.learning_rate:g}, EMA decay {config.ema.decay:g}",
        "dtype": config.dtype,
        "sampler of the recipe": f"{config.sampling.sampler}, {config.sampling.steps} steps, guidance scale "
        f"{config.sampling.guidance_scale:g}",
        "autoencoder": config.data.vae or ("not recorded" if kind == "latents" else "none"),
    }
    lines = [
        "---", "library_name: sra-jax", f"pipeline_tag: {TASKS[captions]}", "tags:",
        *(f"- {tag}" for tag in tags), "---", "", f"# {config.name}", "",
        f"A {'text-to-image' if captions else 'class-conditional'} {family} trained with sra-jax, self-representation "
        "alignment for diffusion transformers in JAX ([arXiv 2505.02831](https://arxiv.org/abs/2505.02831)).", "",
        "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items()), "", "## Method", "",
    ]  # fmt: skip
    lines += [f"- `{part.name}`: {_summary(part.name)}" for part in methods] or [f"`{NONE}`: the denoising loss alone"]
    lines += ["", "The whole recipe, key by key, is in `config.json`.", ""]
    if measured:
        head = ("samples", "guidance scale", "reference", "extractor", *METRICS)
        lines += ["## Results", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        for result in measured:
            sampling = result.get("sampling", {})
            cells = [str(result.get("num_samples", "")), str(sampling.get("guidance_scale", ""))]
            cells += [str(result.get(name) or "") for name in ("reference", "extractor")]
            cells += [f"{result[name]:.4g}" if name in result else "" for name in METRICS]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    prompts = ' --prompt="..."' if captions else ""
    vae = "" if config.data.vae or kind == "pixels" else " --config.data.vae=VAE"
    lines += [
        "## Sample from it", "",
        f"    python tools/convert_checkpoint.py --checkpoint=hf://{PLACE}/{WEIGHTS_FILE} --workdir=W",
        f"    python tools/sample.py --workdir=W --num_samples=64 --grid=grid.png{prompts}", "",
        f"with this repository's name in place of `{PLACE}`. The sampler's settings are flags "
        "(`--guidance_scale=1.8 --guidance_interval=0,0.7`).", "",
        "## Train on from it", "",
        f"    python main.py --config=RECIPE --config.init_from=W --workdir=W2{vae}", "",
        "## In PyTorch", "",
        f"The tensors of `{WEIGHTS_FILE}` have the authors' names; {loaded_by}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _summary(method: str) -> str:
    """The first sentence that a method's module says of it."""
    return (sys.modules[METHODS[method].__module__].__doc__ or method).strip().splitlines()[0]


def write(
    folder: Path, workdir: Path, config: ConfigDict, step: int, weights: str, ema: str, loaded_by: str
) -> None:
    """config.json and the card, last, beside the weights in a folder that is ready to upload."""
    published = publishable(config)
    card = text(published, step, weights, ema, loaded_by, results(workdir, step))
    files.write_results({
        folder / CONFIG_FILE: lambda path: files.write_text(path, config_lib.to_json(published) + "\n"),
        folder / CARD_FILE: lambda path: files.write_text(path, card),
    })  # fmt: skip
