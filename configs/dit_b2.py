"""DiT-B/2 + SRA on ImageNet 256x256: DDPM with learned variance.

    python main.py --config=configs/dit_b2.py --workdir=W --config.data.path=LATENTS
    python main.py --config=configs/dit_b2.py:smoke   # a minute on a CPU, random latents

Hardware (paper): 8 A100, 0.209 h an epoch of 5,004 steps (0.173 h without alignment).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe or a variant of it: `smoke`, a method such as `self_flow`, or both."""
    config = common.dit("B", "dit_b2", student_block=3, teacher_block=7)
    config.steps = 400_000
    return common.variant(config, variant)
