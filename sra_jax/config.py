"""Every key that a recipe has, what it means, and the checks that run before any work starts.

A recipe (configs/*.py) starts from `default()` and changes values; it adds keys only under `process` and `sampling`,
whose keys belong to the family that `process.name` names. A key that nothing reads is refused.
"""

import difflib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from sra_jax.alignment import Alignment
from sra_jax.diffusion.guidance import Guidance
from sra_jax.diffusion.process import Process
from sra_jax.diffusion.registry import PROCESSES, SAMPLERS, Sampler, process_defaults
from sra_jax.errors import UserError
from sra_jax.models.stack import REMAT_POLICIES
from sra_jax.models.transformer import TransformerConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LEARNING_RATE_SCHEDULES = ("constant", "cosine")
EMA_SCHEDULES = ("constant", "cosine")

FREE_KEYS = (
    "steps", "epochs", "examples", "log_every", "sample_every", "checkpoint_every", "keep", "accumulation",
    "data.path", "data.workers", "data.vae", "mesh", "model.remat", "sampling", "evaluation",
)  # fmt: skip
"""Keys, or groups of keys, that a resumed run may change: they move no number beyond float32 rounding. The length of
the run is free as long as no schedule depends on it."""


def default() -> ConfigDict:
    """All keys with their defaults; a recipe must set `data` and `model`.

    Units: lengths of a run in steps unless the name says otherwise; fractions in [0, 1].
    """
    return ConfigDict(
        {
            "name": "run",  # names the default workdir, runs/<name>
            "seed": 0,  # of parameters, data order, noise; a run is a function of its config
            "init_from": "",  # workdir of another run, from whose EMA a new run starts; empty: from random weights
            "steps": 0,  # length of the run; or give one of the next two
            "epochs": 0.0,  # passes over the training set, rounded up to whole steps
            "examples": 0,  # training examples seen, rounded up to whole steps
            "batch_size": 256,  # examples a step over all devices and processes
            "accumulation": 1,  # microbatches a step; divides batch_size
            "dtype": "float32",  # of matrix products: float32 or bfloat16; everything else is float32
            "label_dropout": 0.1,  # share of labels replaced by the null label, for guidance
            "log_every": 100,  # steps between lines of metrics.jsonl
            "sample_every": 10_000,  # steps between preview grids; 0 makes none
            "checkpoint_every": 10_000,  # steps between checkpoints; the last step is always saved
            "keep": 3,  # newest checkpoints that are kept
            "data": {
                "name": "synthetic",  # a name of sra_jax.data.registry.SOURCES
                "path": "",  # latents: the folder that tools/prepare_latents.py made; pixels: idx:DIR and the like
                "image_size": 32,  # height and width that the model sees
                "channels": 4,
                "num_classes": 1000,
                "vae": "",  # autoencoder that decodes latents: a folder or a Hugging Face id; empty: the one they name
                "workers": 0,  # processes that read ahead; 0 reads in threads
            },
            "model": {
                "patch": 2,
                "depth": 12,
                "width": 768,
                "heads": 12,
                "mlp_ratio": 4.0,
                "remat": "none",  # what the backward pass recomputes, from least to most: none, dots, block, full
            },
            # the family: interpolant (SiT) or gaussian (DiT); the other keys are the fields of its class
            "process": {"name": "interpolant", **process_defaults("interpolant")},
            "alignment": {
                "enabled": True,  # False trains the baseline; no teacher is run
                "student_block": 3,  # m, counted from 1
                "teacher_block": 8,  # n >= m
                "distance": "smooth_l1",  # smooth_l1, l1, l2, cosine, cosine_tokens
                "beta": 0.05,  # of smooth_l1
                "weight": 0.2,  # lambda
                "weight_schedule": "constant",  # or decay: a tenth every weight_decay_steps after weight_decay_start
                "weight_decay_start": 0,
                "weight_decay_steps": 1,
                "weight_decay_stair": 1,  # the decaying weight changes once in so many steps
                "interval": (0.0, 0.2),  # teacher earlier by U[low, high) of the whole time range; low = high: fixed
                "head": True,  # projection head on the student
            },
            "optimizer": {
                "learning_rate": 1e-4,
                "schedule": "constant",  # or cosine, to 0 at the last step
                "warmup_steps": 0,  # linear, from 0
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,  # of the global gradient norm; 0 does not clip
            },
            "ema": {
                "decay": 0.9999,
                "schedule": "constant",  # or cosine: from decay to 1 over the run (BYOL)
            },
            "sampling": {
                "sampler": "sde",  # a sampler of the process's family
                "steps": 250,
                "guidance_scale": 1.0,  # at least 1; 1 turns guidance off
                "guidance_interval": (0.0, 1.0),  # guided where low <= t <= high, fractions of the time range
                "guidance_channels": 0,  # guide the first so many channels; 0 guides all
                "preview_classes": 10,  # rows of a preview grid: the first so many classes
                "preview_per_class": 8,  # its columns
            },
            "evaluation": {
                "every": 0,  # steps between evaluations of the EMA; 0 makes none
                "num_samples": 5000,
                "batch_size": 250,  # samples at a time over all devices
                "reference": "dataset",  # the training set's own images, or as tools/fid.py takes it
                "extractor": "inception",  # inception, inception_random or classifier
                "weights": "",  # of the extractor; empty: the cache or the network
            },
            "mesh": {
                "data": -1,  # devices over which the batch is split, with a whole state each; -1: all that are left
                "fsdp": 1,  # devices over which the batch and the state are split; -1: all that are left
                "model": 1,  # devices over which attention heads and the MLP are split (tensor parallelism)
            },
        },
        convert_dict=True,
    )


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf, in order."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_json(config: ConfigDict) -> str:
    """The config as JSON; tuples become lists, `from_json` restores them."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`. Keys that came into being after the text was written get their defaults."""

    def tuples(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(tuples(v) for v in value)
        return {k: tuples(v) for k, v in value.items()} if isinstance(value, dict) else value

    saved = tuples(json.loads(text))
    config = default()
    for group in ("process", "sampling"):  # their keys belong to the saved family
        config[group] = ConfigDict()
    with config.unlocked():
        for key, value in saved.items():
            if isinstance(value, dict) and key in config:
                config[key].update(value)
            else:
                config[key] = value
    return config.lock()


def read(path: Path) -> ConfigDict:
    """The config that a run saved at `path` (its workdir's config.json).

    Raises:
      UserError: there is no such file, or it is not a config.
    """
    try:
        return from_json(path.read_text())
    except OSError as error:
        raise UserError(f"no run at {path.parent}: {path.name} cannot be read ({error.strerror}); train one, or check "
                        "--workdir") from error  # fmt: skip
    except ValueError as error:
        raise UserError(f"{path} is not a saved config: {error}") from error


def differences(saved: ConfigDict, given: ConfigDict) -> list[str]:
    """Keys in which two configs differ so that a run of one cannot continue as the other: `key: saved -> given`."""
    old, new = dict(flatten(saved)), dict(flatten(given))
    scheduled = given.optimizer.schedule != "constant" or given.ema.schedule != "constant"
    free = FREE_KEYS[3:] if scheduled else FREE_KEYS

    def shapes_the_run(key: str) -> bool:
        return key != "name" and not any(key == name or key.startswith(f"{name}.") for name in free)

    return [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if shapes_the_run(key) and old.get(key) != new.get(key)
    ]


def total_steps(config: ConfigDict, num_examples: int) -> int:
    """Length of the run in steps, from whichever of steps, epochs and examples is given."""
    if config.steps:
        return config.steps
    seen = config.examples or config.epochs * num_examples
    return math.ceil(seen / config.batch_size)


def process_of(config: ConfigDict) -> Process:
    """The noise process that `config.process` describes."""
    options = {key: value for key, value in config.process.items() if key != "name"}
    return PROCESSES[config.process.name](**options)


def sampler_of(config: ConfigDict) -> Sampler:
    """The sampler that `config.sampling.sampler` names."""
    return SAMPLERS[config.sampling.sampler]


def alignment_of(config: ConfigDict) -> Alignment | None:
    """What is aligned, or None for the baseline."""
    options = config.alignment.to_dict()
    return Alignment(**options) if options.pop("enabled") else None


def transformer_of(config: ConfigDict) -> TransformerConfig:
    """The network's shape."""
    data, model = config.data, config.model
    return TransformerConfig(
        input_size=data.image_size, channels=data.channels, num_classes=data.num_classes,
        output_channels=process_of(config).output_channels(data.channels), patch=model.patch, depth=model.depth,
        width=model.width, heads=model.heads, mlp_ratio=model.mlp_ratio, dtype=DTYPES[config.dtype],
        remat=model.remat,
    )  # fmt: skip


def guidance_of(config: ConfigDict) -> Guidance:
    """Guidance of the config's sampler; the interval in the process's own time."""
    sampling = config.sampling
    extent = process_of(config).time_extent
    low, high = sampling.guidance_interval
    return Guidance(
        null_label=config.data.num_classes, scale=sampling.guidance_scale, low=low * extent, high=high * extent,
        channels=sampling.guidance_channels or None,
    )  # fmt: skip


def check(config: ConfigDict, device_count: int = 1) -> None:
    """Everything that can be checked without touching data or devices.

    Args:
      config: the recipe with its overrides.
      device_count: devices of all processes.

    Raises:
      UserError: what was given, what is allowed, what to change.
    """
    _check_keys(config)
    _check_training(config, device_count)
    _check_model(config)
    _check_schedules(config)
    process = process_of(config)
    alignment = alignment_of(config)
    if alignment is not None:
        alignment.check(config.model.depth)
    _check_sampling(config, process)


def _choice(key: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value!r} is unknown; allowed: {', '.join(map(str, allowed))}")


def _at_least(config: ConfigDict, minimum: float, *keys: str) -> None:
    for key in keys:
        value = dict(flatten(config))[key]
        if not value >= minimum:
            raise UserError(f"{key}={value} must be at least {minimum}")


def _check_keys(config: ConfigDict) -> None:
    """Exactly the keys that are read: those of `default()` with the family's own."""
    _choice("process.name", config.process.name, PROCESSES)
    expected = default()
    expected.process = ConfigDict({"name": config.process.name, **process_defaults(config.process.name)})
    _choice("sampling.sampler", config.sampling.sampler, SAMPLERS)
    for sampler in SAMPLERS.values():
        if sampler.process == config.process.name:
            expected.sampling.update(sampler.options)
    given, known = dict(flatten(config)), dict(flatten(expected))
    for key in given.keys() - known.keys():
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"config key {key} is not read by anything with process.name={config.process.name!r}{hint}")
    for key in known.keys() - given.keys():
        raise UserError(
            f"config key {key} is missing with process.name={config.process.name!r}; start the recipe from "
            "sra_jax.config.default() or from a recipe of that family"
        )


def _check_training(config: ConfigDict, device_count: int) -> None:
    given = [key for key in ("steps", "epochs", "examples") if config[key]]
    if len(given) != 1:
        raise UserError(
            f"the run's length is given by {' and '.join(given) or 'nothing'}: set exactly one of steps, epochs, "
            "examples and leave the others at 0"
        )
    _at_least(config, 0, "steps", "epochs", "examples", "sample_every", "seed", "evaluation.every")
    _at_least(config, 1, "evaluation.batch_size", "evaluation.num_samples")
    _at_least(config, 1, "batch_size", "accumulation", "log_every", "checkpoint_every", "keep")
    _choice("dtype", config.dtype, DTYPES)
    if not 0 <= config.label_dropout < 1:
        raise UserError(f"label_dropout={config.label_dropout} is out of range: 0 <= label_dropout < 1; the paper: 0.1")
    micro, rest = divmod(config.batch_size, config.accumulation)
    if rest:
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by accumulation={config.accumulation}; change one of them"
        )
    shape = mesh_shape(config, device_count)
    ways = shape["data"] * shape["fsdp"]
    if micro % ways:
        raise UserError(
            f"batch_size={config.batch_size} in accumulation={config.accumulation} parts of {micro} cannot be split "
            f"over {ways} devices; make batch_size a multiple of {ways * config.accumulation}"
        )
    _check_split(config, shape)


def _check_split(config: ConfigDict, shape: dict[str, int]) -> None:
    """The network's matrices can be cut as the mesh asks; one that cannot would lie whole on every device."""
    model = config.model
    hidden = int(model.width * model.mlp_ratio)
    cuts = (
        ("fsdp", model.width, "model.width"), ("model", model.heads, "model.heads"), ("model", hidden, "the MLP width"),
    )  # fmt: skip
    for axis, size, what in cuts:
        if size % shape[axis]:
            fitting = [n for n in range(1, shape[axis]) if shape[axis] % n == 0 and size % n == 0]
            raise UserError(
                f"mesh.{axis}={shape[axis]} does not divide {what}={size}; use at most --config.mesh.{axis}="
                f"{fitting[-1]} and leave the other devices to --config.mesh.data=-1"
            )


def mesh_shape(config: ConfigDict, device_count: int) -> dict[str, int]:
    """Sizes of the mesh axes, with -1 filled in.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    shape = config.mesh.to_dict()
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    wrong = any(size == 0 or size < -1 for size in shape.values())
    if wrong or len(free) > 1 or device_count % fixed or (not free and fixed != device_count):
        sizes = ", ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
        raise UserError(
            f"{sizes} does not fit {device_count} devices: the sizes must multiply to {device_count}, and at most one "
            "may be -1, which takes what is left"
        )
    return {axis: device_count // fixed if size == -1 else size for axis, size in shape.items()}


def _check_model(config: ConfigDict) -> None:
    model, data = config.model, config.data
    _at_least(
        config, 1, "model.patch", "model.depth", "model.width", "model.heads", "data.image_size", "data.channels",
        "data.num_classes",
    )  # fmt: skip
    _at_least(config, 0, "data.workers")
    _choice("model.remat", model.remat, REMAT_POLICIES)
    if not model.mlp_ratio > 0:
        raise UserError(f"model.mlp_ratio={model.mlp_ratio} must be above 0")
    if data.image_size % model.patch:
        raise UserError(
            f"data.image_size={data.image_size} is not divisible by model.patch={model.patch}; use a patch that "
            f"divides it: {', '.join(str(p) for p in (1, 2, 4, 8) if data.image_size % p == 0)}"
        )
    if model.width % model.heads or model.width % 4:
        raise UserError(
            f"model.width={model.width} must be divisible by model.heads={model.heads} and, for the position table, "
            "by 4"
        )


def _check_schedules(config: ConfigDict) -> None:
    optimizer, ema = config.optimizer, config.ema
    _choice("optimizer.schedule", optimizer.schedule, LEARNING_RATE_SCHEDULES)
    _choice("ema.schedule", ema.schedule, EMA_SCHEDULES)
    _at_least(config, 0, "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm")
    if not optimizer.learning_rate > 0 or not optimizer.eps > 0:
        raise UserError(
            f"optimizer.learning_rate={optimizer.learning_rate} and optimizer.eps={optimizer.eps} must be above 0"
        )
    for key in ("b1", "b2"):
        if not 0 <= optimizer[key] < 1:
            raise UserError(f"optimizer.{key}={optimizer[key]} is out of range: 0 <= {key} < 1")
    if not 0 <= ema.decay <= 1:
        raise UserError(f"ema.decay={ema.decay} is out of range: 0 <= decay <= 1; the paper uses 0.9999")


def _check_sampling(config: ConfigDict, process: Process) -> None:
    sampling = config.sampling
    sampler = sampler_of(config)
    if sampler.process != config.process.name:
        fitting = [name for name, other in SAMPLERS.items() if other.process == config.process.name]
        raise UserError(
            f"sampling.sampler={sampling.sampler!r} belongs to process.name={sampler.process!r}; with "
            f"{config.process.name!r} use one of {', '.join(fitting)}"
        )
    if not sampling.guidance_scale >= 1:
        raise UserError(
            f"sampling.guidance_scale={sampling.guidance_scale} is out of range: at least 1, and 1 turns guidance off"
        )
    low, high = sampling.guidance_interval
    if not 0 <= low <= high <= 1:
        raise UserError(
            f"sampling.guidance_interval={sampling.guidance_interval} is out of range: 0 <= low <= high <= 1 are "
            "fractions of the time range (0 = data, 1 = noise); the paper uses (0.0, 0.7)"
        )
    if not 0 <= sampling.guidance_channels <= config.data.channels:
        raise UserError(
            f"sampling.guidance_channels={sampling.guidance_channels} is out of range: 0 (all) to "
            f"data.channels={config.data.channels}"
        )
    _at_least(config, 1, "sampling.preview_classes", "sampling.preview_per_class")
    sampler.check(process, sampling)


def from_flag(value: Any) -> ConfigDict:
    """The config that `config_flags.DEFINE_config_file` made of --config and its overrides.

    Raises:
      UserError: no recipe was given, or its file cannot be used.
    """
    if value is None:
        raise UserError("--config is missing: name a recipe, such as --config=configs/digits.py")
    try:
        return value.copy_and_resolve_references()
    except Exception as error:  # the flag keeps whatever loading the file raised until it is used
        raise UserError(f"--config cannot be used: {error}") from error
