"""Pieces that recipes share."""

from ml_collections import ConfigDict

from sra_jax import config as config_lib

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


def variant(config: ConfigDict, name: str | None) -> ConfigDict:
    """The recipe itself for no name, `smoke` for a one-minute run on a CPU.

    Raises:
      ValueError: another name.
    """
    if not name:
        return config.lock()
    if name == "smoke":
        return smoke(config).lock()
    raise ValueError(f"unknown variant {name!r}; allowed: smoke")


def smoke(config: ConfigDict) -> ConfigDict:
    """The same code at a size that a laptop runs in a minute: four blocks, random latents, few steps."""
    config.name = f"{config.name}_smoke"
    config.steps, config.epochs, config.examples = 20, 0.0, 0
    config.batch_size = 16
    config.dtype = "float32"
    config.log_every, config.sample_every, config.checkpoint_every = 5, 20, 10
    config.data.update(name="synthetic", image_size=16, channels=4, num_classes=10, workers=0)
    config.model.update(depth=4, width=64, heads=4, remat="none")
    config.alignment.update(student_block=1, teacher_block=3)
    config.sampling.update(steps=type(config.sampling.steps)(10), preview_per_class=2)
    config.mesh.update(data=-1, fsdp=1, model=1)
    return config


def paper(size: str, name: str, student_block: int, teacher_block: int, image_size: int) -> ConfigDict:
    """What the paper's SiT and DiT recipes share; the weight of the alignment is the family's."""
    config = config_lib.default()
    config.name = name
    config.batch_size = BATCH_SIZE
    config.dtype = "bfloat16"
    config.data.update(name="latents", image_size=image_size // 8, channels=4, num_classes=1000)
    # Keeping the products costs memory that 256 latent tokens have to spare, and four times as many do not.
    config.model.update(SIZES[size], patch=2, remat="dots" if image_size == 256 else "block")
    # The authors lower the weight by a tenth over so many epochs, once an epoch, after a first stretch.
    first_epoch, tenfold = (149, 1000) if image_size == 256 else (99, 800)
    config.alignment.update(
        student_block=student_block, teacher_block=teacher_block, interval=(0.0, 0.2), distance="smooth_l1", beta=0.05,
        weight_schedule="decay", weight_decay_start=first_epoch * STEPS_PER_EPOCH,
        weight_decay_steps=tenfold * STEPS_PER_EPOCH, weight_decay_stair=STEPS_PER_EPOCH,
    )  # fmt: skip
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
