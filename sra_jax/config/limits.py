"""Which numbers the keys of a recipe may hold, and which keys hold paths.

What depends on other keys (a block beyond the depth, a batch that devices cannot share) is checked in checks.py and by
the method, the process and the sampler.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sra_jax import values
from sra_jax.config.keys import flatten
from sra_jax.errors import UserError

SIDE_LIMIT = 2**14
"""Pixels."""

FLOAT_LIMIT = 1e38
"""What float32 holds."""

PREVIEW_LIMIT = 10_000
"""Images of a preview grid, which are made at once."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that a key may hold.

    Attributes:
      low, high: both ends are allowed.
      open_low, open_high: that end is not.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __str__(self) -> str:
        return values.limits(self.low, self.high, self.open_low, self.open_high)


def _counts(low: int) -> Range:
    return Range(low, values.COUNT_LIMIT)


RANGES: Mapping[str, Range] = {
    "seed": Range(0, values.SEED_LIMIT),
    "steps": _counts(0),
    "epochs": Range(0.0, 1e6),
    "examples": Range(0, 10**15),
    "batch_size": Range(1, 2**24),
    "accumulation": Range(0, values.BATCH_LIMIT),
    "label_dropout": Range(0.0, 1.0, open_high=True),
    "log_every": _counts(1),
    "sample_every": _counts(0),
    "checkpoint_every": _counts(1),
    "keep": _counts(1),
    "keep_every": _counts(0),
    "device_memory": Range(0.0, 1e6),
    "profile.start": _counts(0),
    "profile.steps": _counts(1),
    "data.image_size": Range(1, SIDE_LIMIT),
    "data.channels": Range(1, 4096),
    "data.num_classes": Range(0, 10**6),
    "data.context_length": Range(2, 2**16),
    "data.context_width": Range(1, 2**16),
    "data.workers": Range(0, values.WORKERS_LIMIT),
    "model.patch": Range(1, SIDE_LIMIT),
    "model.depth": Range(1, 1024),
    "model.width": Range(4, 2**16),
    "model.heads": Range(1, 1024),
    "model.mlp_ratio": Range(0.125, 64.0),
    "process.num_steps": Range(2, 10**6),
    "process.teacher_time_min": Range(0, 1),
    "alignment.student_block": Range(1, 1024),
    "alignment.teacher_block": Range(1, 1024),
    "alignment.beta": Range(0.0, FLOAT_LIMIT, open_low=True),
    "alignment.weight": Range(0.0, 1e6),
    "alignment.weight_decay_start": _counts(0),
    "alignment.weight_decay_steps": _counts(1),
    "alignment.weight_decay_stair": _counts(1),
    "optimizer.learning_rate": Range(0.0, FLOAT_LIMIT, open_low=True),
    "optimizer.warmup_steps": _counts(0),
    "optimizer.b1": Range(0.0, 1.0, open_high=True),
    "optimizer.b2": Range(0.0, 1.0, open_high=True),
    "optimizer.eps": Range(0.0, 1.0, open_low=True),
    "optimizer.weight_decay": Range(0.0, 1e4),
    "optimizer.clip_norm": Range(0.0, FLOAT_LIMIT),
    "ema.decay": Range(0.0, 1.0),
    "sampling.steps": Range(1, 10**6),
    "sampling.guidance_scale": Range(1.0, 1000.0),
    "sampling.guidance_channels": Range(0, 4096),
    "sampling.preview_classes": Range(1, PREVIEW_LIMIT),
    "sampling.preview_per_class": Range(1, PREVIEW_LIMIT),
    "sampling.eta": Range(0.0, 1.0),
    "evaluation.every": _counts(0),
    "evaluation.num_samples": _counts(1),
    "evaluation.batch_size": Range(1, values.BATCH_LIMIT),
    "mesh.data": Range(-1, 10**6),
    "mesh.fsdp": Range(-1, 10**6),
    "mesh.model": Range(-1, 10**6),
}
"""Every key that holds a number, but for `method.*`: a method checks its own."""

PATHS = (
    "init_from", "compilation_cache", "data.path", "data.vae", "data.text_encoder", "evaluation.reference",
    "evaluation.weights",
)  # fmt: skip
"""Every key that holds a path, where it holds anything."""

LOCAL_PATHS = ("data.cache",)
"""Every key that holds a path which cannot be an address."""


def check_numbers(config: ConfigDict) -> None:
    """Raises a `UserError` for a number that is none, not finite or out of its key's range."""
    for key, value in flatten(config):
        if (allowed := RANGES.get(key)) and not isinstance(value, str):  # steps of a gaussian sampler may be text
            check_number(key, value, allowed)
        elif isinstance(value, float):  # of a method, which knows its range
            values.number(key, value)


def check_number(key: str, value: Any, allowed: Range) -> None:
    """Raises a `UserError` where `value` is not a number of the range; a whole one where the range's ends are."""
    if isinstance(allowed.low, int):
        values.whole(key, value, allowed.low, int(allowed.high))
    else:
        values.number(key, value, allowed.low, allowed.high, open_low=allowed.open_low, open_high=allowed.open_high)


def check_sizes(config: ConfigDict) -> None:
    """Raises a `UserError` for numbers of which each is possible and all together are not."""
    sampling, model = config.sampling, config.model
    if (images := sampling.preview_classes * sampling.preview_per_class) > PREVIEW_LIMIT:
        raise UserError(
            f"sampling.preview_classes={sampling.preview_classes} and "
            f"sampling.preview_per_class={sampling.preview_per_class} are {images:,} images at once: at most "
            f"{PREVIEW_LIMIT:,}"
        )
    if int(model.width * model.mlp_ratio) < 1:
        raise UserError(f"model.mlp_ratio={model.mlp_ratio} of model.width={model.width} leaves the MLP no width")


def expand_paths(config: ConfigDict) -> None:
    """Expand `~` in the keys that hold paths, in place.

    Raises:
      UserError: an address that nothing here reads, or one where the path must be local.
    """
    for key in (*PATHS, *LOCAL_PATHS):
        group, _, name = key.rpartition(".")
        part = config[group] if group else config
        if part.get(name):
            flag = f"--config.{key}"
            local = key in LOCAL_PATHS
            part[name] = values.path(flag, part[name], local) if local else values.source(flag, part[name])


def workers_here(cores: int) -> int:
    """The most processes that read ahead on a machine of so many cores."""
    return max(8, 4 * cores)


def check_workers(workers: int, cores: int) -> None:
    """Raises a `UserError` where so many workers would choke a machine of so many cores."""
    if workers > workers_here(cores):
        raise UserError(
            f"data.workers={workers} would start {workers} processes on {cores} cores: at most {workers_here(cores)} "
            "here, and a few are enough"
        )


def total_fits(steps: float) -> int:
    """The length of a run, rounded up to whole steps.

    Raises:
      UserError: more steps than are counted.
    """
    if steps > values.COUNT_LIMIT:
        raise UserError(
            f"the run would take {steps:.3g} steps: at most {values.COUNT_LIMIT:,}; lower epochs or examples"
        )
    return math.ceil(steps)
