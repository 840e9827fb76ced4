"""SiT + SRA on scikit-learn's handwritten digits: the demo. A CPU trains it in minutes.

    python main.py --config=configs/digits.py
    python tools/sample.py --workdir=runs/digits --num_samples=1000 --output=samples.npz --grid=grid.png

Eight by eight grey pixels in 16 tokens, 1.3M parameters. The EMA is short because the run is: 0.9999 is for hundreds of
thousands of steps.
"""

from ml_collections import ConfigDict

from sra_jax import config as config_lib


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe; there are no variants."""
    if variant:
        raise ValueError(f"configs/digits.py has no variant {variant!r}")
    config = config_lib.default()
    config.name = "digits"
    config.steps = 3000
    config.batch_size = 64
    config.log_every, config.sample_every, config.checkpoint_every = 50, 1000, 500
    config.data.update(name="digits", image_size=8, channels=1, num_classes=10)
    config.model.update(patch=2, depth=6, width=96, heads=4, remat="none")
    config.alignment.update(student_block=2, teacher_block=4)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine")
    config.ema.decay = 0.99
    config.sampling.update(sampler="sde", steps=100, guidance_scale=1.5)
    return config.lock()
