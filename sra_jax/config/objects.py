"""What a config describes: the objects that the rest of the code works with."""

import math
from typing import Any

from ml_collections import ConfigDict

from sra_jax import values
from sra_jax.config.keys import AUTO, DTYPES
from sra_jax.config.limits import total_fits
from sra_jax.config.profiles import Profile, profiles
from sra_jax.diffusion.guidance import Condition, Guidance
from sra_jax.diffusion.process import Process
from sra_jax.diffusion.registry import PROCESSES, SAMPLERS, Sampler
from sra_jax.errors import UserError
from sra_jax.methods.correction import Correction, LatentMeans
from sra_jax.methods.registry import NONE, Methods, build, names_of
from sra_jax.models.flops import Shape, StepFlops, train_step_flops
from sra_jax.models.mmdit import MMDiTConfig
from sra_jax.models.transformer import TransformerConfig


def total_steps(config: ConfigDict, num_examples: int) -> int:
    """Length of the run in steps, from whichever of steps, epochs and examples is given.

    Raises:
      UserError: more steps than are counted.
    """
    if config.steps:
        return config.steps
    seen = config.examples or config.epochs * num_examples
    return total_fits(seen / config.batch_size)


def profiles_of(config: ConfigDict) -> tuple[Profile, ...]:
    """The EMAs that are tracked beside the teacher's."""
    return profiles("ema.profiles", config.ema.profiles)


def process_of(config: ConfigDict) -> Process:
    """The noise process that `config.process` describes."""
    options = {key: value for key, value in config.process.items() if key != "name"}
    return PROCESSES[config.process.name](**options)


def sampler_of(config: ConfigDict) -> Sampler:
    """The sampler that `config.sampling.sampler` names."""
    return SAMPLERS[config.sampling.sampler]


def method_names(config: ConfigDict) -> tuple[str, ...]:
    """The methods that a run trains with; `alignment.enabled=False` takes SRA out of them."""
    return tuple(name for name in names_of(config.method.name) if name != "sra" or config.alignment.enabled)


def methods_of(config: ConfigDict) -> Methods:
    """The methods with their keys, as one."""
    names = method_names(config)
    keys = {name: config.method[name].to_dict() for name in names if name != "sra"}
    if "sra" in names:
        keys["sra"] = config.alignment.to_dict()
        del keys["sra"]["enabled"]
    return build("+".join(names) or NONE, keys)


def tells_captions(config: ConfigDict) -> bool:
    """Whether the network is told captions; else it is told labels."""
    return config.model.name == "mmdit"


def transformer_of(config: ConfigDict) -> Shape:
    """The network's shape."""
    data, model = config.data, config.model
    common = {
        "input_size": data.image_size, "channels": data.channels,
        "output_channels": process_of(config).output_channels(data.channels), "patch": model.patch,
        "depth": model.depth, "width": model.width, "heads": model.heads, "mlp_ratio": model.mlp_ratio,
        "dtype": DTYPES[config.dtype],
        "remat": "dots" if model.remat == AUTO else model.remat,
    }  # fmt: skip
    if not tells_captions(config):
        return TransformerConfig(num_classes=data.num_classes, null_label=model.null_label, **common)
    return MMDiTConfig(
        context_width=data.context_width, context_length=data.context_length, pooled=model.pooled,
        initialisation=model.initialisation, **common,
    )  # fmt: skip


def guidance_interval(name: str, value: Any) -> tuple[float, float]:
    """The guidance interval that the key or flag `name` gives, as fractions of the time range.

    Raises:
      UserError: it is none.
    """
    return values.interval(
        name, value, fixed=False,
        advice="they are fractions of the time range (0 = data, 1 = noise), and the paper uses 0,0.7",
    )  # fmt: skip


def guidance_of(config: ConfigDict, null: Condition | None = None) -> Guidance:
    """Guidance of the config's sampler; the interval in the process's own time.

    Args:
      config: the recipe.
      null: the empty caption, where the network is told captions; else the null label.
    """
    sampling = config.sampling
    extent = process_of(config).time_extent
    low, high = guidance_interval("sampling.guidance_interval", sampling.guidance_interval)
    return Guidance(
        null=config.data.num_classes if null is None else null, scale=sampling.guidance_scale, low=low * extent,
        high=high * extent, channels=sampling.guidance_channels or None,
    )  # fmt: skip


def correction_of(config: ConfigDict, means: LatentMeans | None) -> Correction | None:
    """What the run's sampler takes back of its method's shift of the velocity; None: nothing, or no means are given."""
    method = methods_of(config).correcting
    if method is None or means is None or not config.sampling.correction:
        return None
    return method.correction(means, process_of(config), config.data.num_classes, config.label_dropout)


def step_flops(config: ConfigDict) -> StepFlops:
    """Analytic floating-point operations of one training step of the whole batch."""
    shape, methods = transformer_of(config), methods_of(config)
    teaching = methods.teaching
    return train_step_flops(
        shape, config.batch_size, head=methods.head_flops(shape), groups=methods.sizes(shape) or methods.groups,
        teacher_blocks=methods.teacher_taps[-1] if teaching else None,
        teacher_groups=teaching.teacher_groups(shape) if teaching else 1,
    )  # fmt: skip


def accumulation_of(config: ConfigDict) -> int:
    """Microbatches a step; one where the config leaves it to the devices' memory and nobody has asked that yet."""
    return config.accumulation or 1


def fewest_devices(config: ConfigDict) -> int:
    """The smallest number of devices that `config.mesh` can be laid over."""
    return math.prod(max(1, size) for size in config.mesh.values())


def mesh_shape(config: ConfigDict, device_count: int) -> dict[str, int]:
    """Sizes of the mesh axes, with -1 filled in, and for fsdp=0 as few devices as the other axes leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    shape = config.mesh.to_dict()
    if shape["fsdp"] == 0:
        others = shape["data"] * shape["model"]
        shape["fsdp"] = device_count // others if others > 0 and device_count % others == 0 else 1
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
