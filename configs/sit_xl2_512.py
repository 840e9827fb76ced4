"""SiT-XL/2 + SRA on ImageNet 512x512.

    python main.py --config=configs/sit_xl2_512.py --workdir=W --config.data.path=LATENTS
    python main.py --config=configs/sit_xl2_512.py:smoke   # a minute on a CPU, random latents

Expected (paper): FID 2.17 after 200 epochs, 2.07 after 400 with guidance 2.5, SDE with 250 steps, 50,000 samples, ADM
suite. The weight of the alignment decays from epoch 99 on.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe or a variant of it: `smoke`, a method such as `self_flow`, or both."""
    config = common.sit("XL", "sit_xl2_512", student_block=8, teacher_block=20, image_size=512)
    config.steps = 400 * common.STEPS_PER_EPOCH
    config.sampling.update(guidance_scale=2.5, guidance_interval=(0.0, 0.7))
    return common.variant(config, variant)
