"""What can be checked of a config before any work, without touching data or devices."""

import difflib

from ml_collections import ConfigDict

from sra_jax.config.keys import (
    AUTO,
    CAPTION_FORMS,
    CAPTION_KEYS,
    DTYPES,
    EMA_SCHEDULES,
    LEARNING_RATE_SCHEDULES,
    default,
    flatten,
    tell_captions,
)
from sra_jax.config.limits import check_numbers, check_sizes
from sra_jax.config.objects import (
    accumulation_of,
    guidance_interval,
    mesh_shape,
    methods_of,
    process_of,
    profiles_of,
    sampler_of,
    tells_captions,
    transformer_of,
)
from sra_jax.config.profiles import TEACHER, profile
from sra_jax.diffusion.process import Process
from sra_jax.diffusion.registry import PROCESSES, SAMPLERS, process_defaults
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.methods.method import check_choice
from sra_jax.methods.registry import names_of
from sra_jax.models import attention
from sra_jax.models.mmdit import INITIALISATIONS
from sra_jax.models.stack import REMAT_POLICIES


def check(config: ConfigDict, device_count: int = 1, platform: str | None = None) -> None:
    """Everything that can be checked without touching data or devices.

    Args:
      config: the recipe with its overrides.
      device_count: devices of all processes.
      platform: their kind, as `sra_jax.models.attention` tells kinds apart; None: they are not known yet.

    Raises:
      UserError: what was given, what is allowed, what to change.
    """
    _check_keys(config)
    check_numbers(config)
    check_sizes(config)
    _check_training(config, device_count)
    _check_model(config)
    shape = transformer_of(config)
    attention.chosen(
        config.model.attention, attention.Case(platform, shape.dtype, shape.width // shape.heads, shape.attended)
    )  # raises
    _check_schedules(config)
    process = process_of(config)
    methods_of(config).check(
        config.process.name, transformer_of(config), config.batch_size, config.batch_size // accumulation_of(config)
    )
    for method in methods_of(config):
        method.shift(config.label_dropout)  # raises
    _check_sampling(config, process)


def _check_keys(config: ConfigDict) -> None:
    """Exactly the keys that are read: those of `default()` with the family's own."""
    check_choice("process.name", config.process.name, PROCESSES)
    expected = default()
    expected.process = ConfigDict({"name": config.process.name, **process_defaults(config.process.name)})
    check_choice("sampling.sampler", config.sampling.sampler, SAMPLERS)
    for sampler in SAMPLERS.values():
        if sampler.process == config.process.name:
            expected.sampling.update(sampler.options)
    names_of(config.method.name)  # raises
    check_choice("model.name", config.model.name, ("transformer", "mmdit"))
    if tells_captions(config):
        tell_captions(expected)
    given, known = dict(flatten(config)), dict(flatten(expected))
    for key in given.keys() - known.keys():
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"config key {key} is not read by anything with {_family(config, key)}{hint}")
    for key in known.keys() - given.keys():
        raise UserError(
            f"config key {key} is missing with {_family(config, key)}; start the recipe from "
            "sra_jax.config.default() or from a recipe of that family"
        )


def _family(config: ConfigDict, key: str) -> str:
    """What decides whether there is such a key."""
    if key in CAPTION_KEYS:
        return f"model.name={config.model.name!r}"
    return f"process.name={config.process.name!r}"


def _check_training(config: ConfigDict, device_count: int) -> None:
    given = [key for key in ("steps", "epochs", "examples") if config[key]]
    if len(given) != 1:
        raise UserError(
            f"the run's length is given by {' and '.join(given) or 'nothing'}: set exactly one of steps, epochs, "
            "examples and leave the others at 0"
        )
    check_choice("dtype", config.dtype, DTYPES)
    parts = accumulation_of(config)
    micro, rest = divmod(config.batch_size, parts)
    if rest:
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by accumulation={parts}; change one of them"
        )
    shape = mesh_shape(config, device_count)
    ways = shape["data"] * shape["fsdp"]
    if micro % ways:
        raise UserError(
            f"batch_size={config.batch_size} in accumulation={parts} parts of {micro} cannot be split "
            f"over {ways} devices; make batch_size a multiple of {ways * parts}"
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


def _check_model(config: ConfigDict) -> None:
    model, data = config.model, config.data
    check_choice("model.remat", model.remat, (*REMAT_POLICIES, AUTO))
    check_choice("model.products", model.products, sharding.PRODUCTS)
    check_choice("model.unroll", model.unroll, (AUTO, "yes", "no"))
    if tells_captions(config):
        _check_captions(config)
    elif not data.num_classes:
        raise UserError("data.num_classes=0 leaves no label to be told: at least 1; captions take model.name=mmdit")
    if data.image_size % model.patch:
        raise UserError(
            f"data.image_size={data.image_size} is not divisible by model.patch={model.patch}; use a patch that "
            f"divides it: {', '.join(str(p) for p in (1, 2, 4, 8) if data.image_size % p == 0)}"
        )
    if config.label_dropout and not model.null_label:
        raise UserError(
            f"label_dropout={config.label_dropout} replaces labels by the null label, which model.null_label=False "
            "leaves out: set one of label_dropout=0 and model.null_label=True"
        )
    if model.width % model.heads or model.width % 4:
        raise UserError(
            f"model.width={model.width} must be divisible by model.heads={model.heads} and, for the position table, "
            "by 4"
        )


def _check_captions(config: ConfigDict) -> None:
    model, data, prompts = config.model, config.data, config.sampling.preview_prompts
    check_choice("model.initialisation", model.initialisation, INITIALISATIONS)
    check_choice("data.captions", data.captions, CAPTION_FORMS)
    if model.depth < 2:
        raise UserError(f"model.depth={model.depth} is too few with model.name=mmdit: its last block is a special one")
    if data.num_classes:
        raise UserError(f"data.num_classes={data.num_classes}: there are no labels with model.name=mmdit, give 0")
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"sampling.preview_prompts={prompts!r} must be captions, at least one: ('a cat','a dog')")
    if config.evaluation.every:
        raise UserError(
            f"evaluation.every={config.evaluation.every} needs labels; measure a run with captions by tools/fid.py "
            "--prompts and set evaluation.every=0"
        )


def _check_schedules(config: ConfigDict) -> None:
    optimizer, ema = config.optimizer, config.ema
    check_choice("optimizer.schedule", optimizer.schedule, LEARNING_RATE_SCHEDULES)
    check_choice("ema.schedule", ema.schedule, EMA_SCHEDULES)
    names = (TEACHER, *(one.name for one in profiles_of(config)))
    if ema.sampled != TEACHER and profile("ema.sampled", ema.sampled).name not in names:
        raise UserError(f"ema.sampled={ema.sampled!r} is not tracked; allowed: {', '.join(names)} (ema.profiles)")
    if config.keep_every % config.checkpoint_every:
        raise UserError(
            f"keep_every={config.keep_every} must be a multiple of checkpoint_every={config.checkpoint_every}: only "
            "what is saved can be kept"
        )


def _check_sampling(config: ConfigDict, process: Process) -> None:
    sampling = config.sampling
    sampler = sampler_of(config)
    if sampler.process != config.process.name:
        fitting = [name for name, other in SAMPLERS.items() if other.process == config.process.name]
        raise UserError(
            f"sampling.sampler={sampling.sampler!r} belongs to process.name={sampler.process!r}; with "
            f"{config.process.name!r} use one of {', '.join(fitting)}"
        )
    if sampling.guidance_scale > 1 and not config.model.null_label:
        raise UserError(
            f"sampling.guidance_scale={sampling.guidance_scale} needs a null label, and this model has none "
            "(model.null_label=False): sample with guidance_scale=1"
        )
    if sampling.guidance_scale > 1 and not config.label_dropout:
        raise UserError(
            f"sampling.guidance_scale={sampling.guidance_scale} needs a null label that was trained, and this run's "
            "label_dropout=0 never shows it: sample with guidance_scale=1, or train with label_dropout=0.1"
        )
    guidance_interval("sampling.guidance_interval", sampling.guidance_interval)
    if not 0 <= sampling.guidance_channels <= config.data.channels:
        raise UserError(
            f"sampling.guidance_channels={sampling.guidance_channels} is out of range: 0 (all) to "
            f"data.channels={config.data.channels}"
        )
    sampler.check(process, sampling)
