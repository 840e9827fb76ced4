"""SiT + SRA on Fashion-MNIST in pixel space: 28x28 grey, ten classes, 60,000 images.

    python main.py --config=configs/fashion_mnist.py        # Debian: apt-get install dataset-fashion-mnist
    python main.py --config=configs/fashion_mnist.py --config.data.path=idx:FOLDER     # the IDX files anywhere else
    python main.py --config=configs/fashion_mnist.py --config.data.path=tfds:fashion_mnist     # prepared by TFDS
    python tools/fid.py --workdir=runs/fashion_mnist --reference=dataset --extractor=classifier --num_samples=1000

Patches of 4: 49 tokens of width 128, 1.9M parameters; about 0.5 s a step on two CPU cores. `:study` is as deep as B and
narrow, for comparisons of methods (docs/evidence.md): minutes a run on one core.
"""

from ml_collections import ConfigDict

from configs import common
from sra_jax import config as config_lib


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe or a variant of it: `study`, `smoke`, a method such as `self_flow`, or several of them."""
    config = config_lib.default()
    config.name = "fashion_mnist"
    config.steps = 2000
    config.batch_size = 128
    config.log_every, config.sample_every, config.checkpoint_every = 50, 1000, 500
    config.data.update(
        name="pixels", path="idx:/usr/share/datasets/fashion-mnist", image_size=28, channels=1, num_classes=10
    )
    config.model.update(patch=4, depth=6, width=128, heads=4, remat="dots")
    config.alignment.update(student_block=2, teacher_block=4)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine")
    config.ema.decay = 0.995
    config.sampling.update(sampler="sde", steps=50, guidance_scale=1.5)
    common.small_methods(config, standardise="target")
    return common.variant(config, variant, own={"study": study})


def study(config: ConfigDict) -> None:
    """Twelve blocks with the papers' block numbers, narrow, short, without guidance: many runs on few cores."""
    config.steps, config.batch_size = 800, 64
    config.log_every = 20
    config.model.update(depth=12, width=64, heads=4, remat="none")
    config.alignment.update(student_block=3, teacher_block=8)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=50, schedule="constant")
    config.ema.decay = 0.99
    config.sampling.update(sampler="ode", steps=25, guidance_scale=1.0)
    config.evaluation.update(extractor="classifier", num_samples=1000, batch_size=250)
    common.small_methods(config, standardise="target")
