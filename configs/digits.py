"""SiT + SRA on scikit-learn's handwritten digits: the demo. A CPU trains it in minutes.

    python main.py --config=configs/digits.py
    python tools/sample.py --workdir=runs/digits --num_samples=1000 --output=samples.npz --grid=grid.png
    python main.py --config=configs/digits.py:dit     # the same with DDPM: workdir runs/digits_dit

Eight by eight grey pixels in 16 tokens, 1.1M parameters. The EMA is short because the run is: 0.9999 is for hundreds of
thousands of steps.
"""

from ml_collections import ConfigDict

from configs import common
from sra_jax import config as config_lib


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe or a variant of it: `dit` (DDPM with learned variance), a method such as `self_flow`, or both."""
    config = config_lib.default()
    config.name = "digits"
    config.steps = 2000
    config.batch_size = 64
    config.log_every, config.sample_every, config.checkpoint_every = 50, 1000, 500
    config.data.update(name="digits", image_size=8, channels=1, num_classes=10)
    config.model.update(patch=2, depth=6, width=96, heads=4, remat="block")
    config.alignment.update(student_block=2, teacher_block=4)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.ema.decay = 0.99
    config.sampling.update(sampler="sde", steps=50, guidance_scale=1.5)
    common.small_methods(config, standardise="target")
    return common.variant(config, variant, own={"dit": dit}, small=False)


def dit(config: ConfigDict) -> None:
    """DDPM with learned variance in place of the flow."""
    config.alignment.weight = 0.04
    common.gaussian(config, steps="50")
