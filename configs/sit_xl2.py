"""SiT-XL/2 + SRA on ImageNet 256x256, the paper's main result.

    python main.py --config=configs/sit_xl2.py --workdir=W --config.data.path=LATENTS
    python main.py --config=configs/sit_xl2.py:smoke   # a minute on a CPU, random latents

Expected (paper): FID 1.58, sFID 4.65, IS 311.4, precision 0.80, recall 0.63 after 800 epochs with guidance 1.8 on
t in [0, 0.7], SDE with 250 steps, 50,000 samples, ADM suite. SiT-XL/2 without alignment: FID 2.06 after 1,400 epochs.
Hardware (paper): 8 A100, 0.476 h and 30.2 GB an epoch of 5,004 steps (0.394 h without alignment).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe or a variant of it: `smoke`, a method such as `self_flow`, or both."""
    config = common.sit("XL", "sit_xl2", student_block=8, teacher_block=20)
    config.steps = 800 * common.STEPS_PER_EPOCH
    config.sampling.update(guidance_scale=1.8, guidance_interval=(0.0, 0.7))
    return common.variant(config, variant)
