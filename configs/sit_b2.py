"""SiT-B/2 + SRA on ImageNet 256x256, the paper's ablation setting.

    python main.py --config=configs/sit_b2.py --workdir=W --config.data.path=LATENTS
    python main.py --config=configs/sit_b2.py:smoke   # a minute on a CPU, random latents

Expected (paper): FID 29.10, IS 50.20 at 400k steps, SDE with 250 steps, no guidance, 50,000 samples, ADM suite.
Without alignment (--config.alignment.enabled=False): FID 33.02, IS 43.71. The ODE samplers give about 1 FID more.
Hardware (paper): 8 A100, 0.115 h and 13.2 GB an epoch of 5,004 steps (0.096 h without alignment).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe or a variant of it: `smoke`, a method such as `self_flow`, or both."""
    config = common.sit("B", "sit_b2", student_block=3, teacher_block=8)
    config.steps = 400_000
    return common.variant(config, variant)
