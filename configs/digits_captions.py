"""Text to image in small: MMDiT + SRA on captions of scikit-learn's handwritten digits. A CPU trains it in minutes.

    python main.py --config=configs/digits_captions.py
    python tools/sample.py --workdir=runs/digits_captions --prompt="one, then four" --num_samples=10 --grid=grid.png
    python tools/fid.py --workdir=runs/digits_captions --prompts=held_out --num_samples=1000

One or two real scans on a 16x16 canvas, told in words: "a three", "one, then four". Twenty of the hundred ordered pairs
are never trained in any wording; the second number of the last command is the share of them that is drawn right.
"""

from ml_collections import ConfigDict

from configs import common
from sra_jax import config as config_lib


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe, or a variant of it: a method such as `layersync`."""
    config = config_lib.default()
    config_lib.tell_captions(config)
    config.name = "digits_captions"
    config.steps = 2600
    config.batch_size = 64
    config.log_every, config.sample_every, config.checkpoint_every = 50, 1000, 500
    config.data.update(name="digits_captions", image_size=16, channels=1, context_length=9, context_width=64)
    config.model.update(patch=4, depth=5, width=96, heads=4, initialisation="adaln_zero")
    config.alignment.update(student_block=2, teacher_block=3)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine")
    config.ema.decay = 0.99
    config.sampling.update(
        sampler="ode", steps=25, guidance_scale=2.0, preview_per_class=8,
        preview_prompts=("a three", "a seven left of a one", "one, then four", "a five right of a two"),
    )  # fmt: skip
    common.small_methods(config, standardise="target")
    return common.variant(config, variant, small=False)
