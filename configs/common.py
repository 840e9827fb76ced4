"""Pieces that recipes share."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.methods.registry import METHODS

IMAGENET_EXAMPLES = 1_281_167
BATCH_SIZE = 256
STEPS_PER_EPOCH = IMAGENET_EXAMPLES // BATCH_SIZE  # 5,004, as the authors count epochs

SIZES = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}
"""DiT's sizes (Peebles and Xie, 2023, table 1)."""


BLOCKS: dict[str, dict[str, tuple[int, ...]]] = {
    "S": {"layersync": (4, 8), "self_flow": (4, 8), "dts_as": (3, 8), "sra2": (2,), "repa": (4,)},
    "B": {"layersync": (4, 8), "self_flow": (4, 8), "dts_as": (3, 8), "sra2": (2,), "repa": (4,)},
    "L": {"layersync": (8, 18), "self_flow": (7, 17), "dts_as": (6, 16), "sra2": (8,), "repa": (8,)},
    "XL": {"layersync": (8, 16), "self_flow": (8, 20), "dts_as": (8, 20), "sra2": (8,), "repa": (8,)},
}
"""The blocks that each method's paper uses for a size, SRA's apart; S takes B's."""


def methods(config: ConfigDict, size: str) -> None:
    """The papers' blocks for a size (docs/methods.md)."""
    _set_blocks(config, BLOCKS[size])


def small_methods(config: ConfigDict, standardise: str) -> None:
    """Blocks at the same fractions of the depth as in B, and heads to the network's size.

    Args:
      config: with the network's shape.
      standardise: of SRA 2's target: "none" on latents of Stable Diffusion's autoencoder, "target" on others and on
        pixels.
    """
    depth, width = config.model.depth, config.model.width

    def scaled(blocks: tuple[int, ...]) -> tuple[int, ...]:
        first = max(1, round(blocks[0] * depth / 12))
        return first, *(max(first + 1, round(later * depth / 12)) for later in blocks[1:])

    _set_blocks(config, {name: scaled(blocks) for name, blocks in BLOCKS["B"].items()})
    config.method.sra2.update(hidden=2 * width, standardise=standardise)
    for name in ("repa", "repa_conv"):
        config.method[name].update(hidden=2 * width, widths=(width,))


def _set_blocks(config: ConfigDict, blocks: Mapping[str, tuple[int, ...]]) -> None:
    method = config.method
    method.layersync.update(dict(zip(("student_block", "target_block"), blocks["layersync"], strict=True)))
    for name in ("self_flow", "dts_as"):
        method[name].update(dict(zip(("student_block", "teacher_block"), blocks[name], strict=True)))
    for name, key in (("sra2", "sra2"), ("repa", "repa"), ("repa_conv", "repa")):
        (method[name].student_block,) = blocks[key]
    method.dispersive.block = max(1, round(config.model.depth / 4))


def sra_cosine(config: ConfigDict) -> None:
    """SRA as its authors advise since July 2026: cosine over features, weight 0.5, constant."""
    config.alignment.update(distance="cosine", weight=0.5, weight_schedule="constant")


def variant(
    config: ConfigDict, text: str | None, own: Mapping[str, Callable[[ConfigDict], None]] | None = None,
    small: bool = True,
) -> ConfigDict:
    """The recipe, changed as the variants say that follow its name: `configs/NAME.py:smoke,self_flow`.

    Args:
      config: the recipe.
      text: names with commas between, in any order: the recipe's own, `smoke`, and one method or sum of methods
        (`none`, `sra`, `sra_cosine`, a name of `sra_jax.methods.registry.METHODS`, `sra+dispersive`).
      own: the recipe's own variants by name.
      small: whether there is a `smoke`.

    Raises:
      ValueError: an unknown name, or two methods that are not written as a sum.
    """
    own = {**(own or {}), **({"smoke": smoke} if small else {})}
    given = [name.strip() for name in (text or "").split(",") if name.strip()]
    sums = [name for name in given if name not in own]
    for name in sums:
        for part in name.split("+"):
            if part not in ("none", "sra_cosine", *METHODS):
                allowed = ", ".join([*own, "none", "sra_cosine", *METHODS])
                raise ValueError(
                    f"unknown variant {part!r}; allowed: {allowed}; several with commas between, methods with + between"
                )
    if len(sums) > 1:
        raise ValueError(f"variants {' and '.join(sums)} are both methods; their sum is {'+'.join(sums)}")
    for name, change in own.items():
        if name in given:
            change(config)
            config.name = f"{config.name}_{name}"
    for name in sums:
        parts = name.split("+")
        if "sra_cosine" in parts:
            sra_cosine(config)
        config.method.name = "+".join("sra" if part == "sra_cosine" else part for part in parts)
        config.name = f"{config.name}_{name}"
    return config.lock()


def smoke(config: ConfigDict) -> None:
    """The same code at a size that a laptop runs in a minute: four blocks, random latents, few steps."""
    config.steps, config.epochs, config.examples = 20, 0.0, 0
    config.batch_size = 16
    config.dtype = "float32"
    config.log_every, config.sample_every, config.checkpoint_every = 5, 20, 10
    config.data.update(name="synthetic", image_size=16, channels=4, num_classes=10, workers=0)
    if config_lib.tells_captions(config):
        config.data.update(num_classes=0, captions="embeddings", context_length=8, context_width=32)
    config.model.update(depth=4, width=64, heads=4, remat="none")
    config.alignment.update(student_block=1, teacher_block=3)
    config.sampling.update(steps=type(config.sampling.steps)(10), preview_per_class=2)
    config.accumulation = 1
    config.mesh.update(data=-1, fsdp=0, model=1)
    small_methods(config, standardise="none")


def paper(size: str, name: str, student_block: int, teacher_block: int, image_size: int) -> ConfigDict:
    """What the paper's SiT and DiT recipes share; the weight of the alignment is the family's."""
    config = config_lib.default()
    config.name = name
    config.batch_size = BATCH_SIZE
    config.dtype = "bfloat16"
    config.data.update(name="latents", image_size=image_size // 8, channels=4, num_classes=1000)
    # Where these run is not known: mesh, recomputation and accumulation are left to the devices' memory.
    config.model.update(SIZES[size], patch=2, remat=config_lib.AUTO)
    config.accumulation = 0
    # The authors lower the weight by a tenth over so many epochs, once an epoch, after a first stretch.
    first_epoch, tenfold = (149, 1000) if image_size == 256 else (99, 800)
    config.alignment.update(
        student_block=student_block, teacher_block=teacher_block, interval=(0.0, 0.2), distance="smooth_l1", beta=0.05,
        weight_schedule="decay", weight_decay_start=first_epoch * STEPS_PER_EPOCH,
        weight_decay_steps=tenfold * STEPS_PER_EPOCH, weight_decay_stair=STEPS_PER_EPOCH,
    )  # fmt: skip
    methods(config, size)
    config.optimizer.update(learning_rate=1e-4, clip_norm=1.0)
    config.ema.decay = 0.9999
    config.log_every, config.sample_every, config.checkpoint_every = 100, 25_000, 10_000
    return config


def sit(size: str, name: str, student_block: int, teacher_block: int, image_size: int = 256) -> ConfigDict:
    """The paper's SiT + SRA recipe: everything but the length of the run and guidance."""
    config = paper(size, name, student_block, teacher_block, image_size)
    config.alignment.weight = 0.2
    config.sampling.update(sampler="sde", steps=250)
    return config


def dit(size: str, name: str, student_block: int, teacher_block: int, image_size: int = 256) -> ConfigDict:
    """The paper's DiT + SRA recipe: everything but the length of the run and guidance."""
    config = paper(size, name, student_block, teacher_block, image_size)
    config.alignment.weight = 0.04
    gaussian(config, steps="250")
    return config


def gaussian(config: ConfigDict, steps: str) -> None:
    """Noise with DDPM instead of the flow, and sample with `steps` respaced steps (a number or a list of sections)."""
    del config["sampling"]["steps"]
    config.process = ConfigDict({"name": "gaussian", **config_lib.process_defaults("gaussian")})
    config.sampling.update(sampler="ddpm", steps=steps, eta=0.0)
