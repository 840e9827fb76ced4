"""SiT-L/2 + SRA on ImageNet 256x256.

    python main.py --config=configs/sit_l2.py --workdir=W --config.data.path=LATENTS
    python main.py --config=configs/sit_l2.py:smoke   # a minute on a CPU, random latents

Hardware (paper): 8 A100, 0.330 h and 26.7 GB an epoch of 5,004 steps (0.282 h without alignment).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe or a variant of it: `smoke`, a method such as `self_flow`, or both."""
    config = common.sit("L", "sit_l2", student_block=6, teacher_block=16)
    config.steps = 400_000
    return common.variant(config, variant)
