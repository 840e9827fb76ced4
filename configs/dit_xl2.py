"""DiT-XL/2 + SRA on ImageNet 256x256: DDPM with learned variance.

    python main.py --config=configs/dit_xl2.py --workdir=W --config.data.path=LATENTS
    python main.py --config=configs/dit_xl2.py:smoke   # a minute on a CPU, random latents

With smooth-L1 the alignment loss grows late in training, for feature norms grow; the authors decay its weight, and
since July 2026 recommend the cosine distance: --config.alignment.distance=cosine --config.alignment.weight=0.5
--config.alignment.weight_schedule=constant.
Hardware (paper): 8 A100, 0.804 h an epoch of 5,004 steps (0.719 h without alignment).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe or a variant of it: `smoke`, a method such as `self_flow`, or both."""
    config = common.dit("XL", "dit_xl2", student_block=8, teacher_block=16)
    config.steps = 400_000
    return common.variant(config, variant)
