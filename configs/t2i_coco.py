"""Text to image: MMDiT + SRA on COCO's captions, 256x256 (the paper's table 2), as REPA trains it.

    python main.py --config=configs/t2i_coco.py --workdir=W --config.data.path=LATENTS
    python tools/fid.py --workdir=W --prompts=coco:/data/coco:val2014 --num_samples=30000 --resize=pytorch --reference=S
    python main.py --config=configs/t2i_coco.py:smoke     # a minute on a CPU, random latents and captions

LATENTS is what tools/prepare_latents.py makes of COCO's train2014 (docs/text_to_image.md). Expected (paper, 150,000
steps, ODE of 50 steps): FID 4.85, PickScore 21.14; without alignment 5.86 and 20.05; with REPA 4.60 and 20.88.

505M parameters; 363 GFLOP an image and step, and 81 more for the teacher. The paper does not say which blocks are
aligned, nor the guidance of its figures: blocks 8 -> 16 of 24 follow its rule for other depths (from 30% to 70%), and
guidance 2.0 is REPA's for the same figures.
"""

from ml_collections import ConfigDict

from configs import common
from sra_jax import config as config_lib

PREVIEWS = (
    "a green train is coming down the tracks", "a group of skiers are preparing to ski down a mountain",
    "a small kitchen with low ceiling", "a kite flying in the blue sky over the sea",
)  # fmt: skip


def get_config(variant: str | None = None) -> ConfigDict:
    """The recipe or a variant of it: `smoke`, a method such as `layersync`, or both."""
    config = config_lib.default()
    config_lib.tell_captions(config)
    config.name = "t2i_coco"
    config.steps = 150_000
    config.batch_size = 256
    config.dtype = "bfloat16"
    config.log_every, config.sample_every, config.checkpoint_every = 100, 10_000, 10_000
    config.data.update(name="latents", image_size=32, channels=4, context_length=77, context_width=768)
    config.model.update(patch=2, depth=24, width=768, heads=24, initialisation="uniform", remat=config_lib.AUTO)
    config.accumulation = 0
    config.alignment.update(student_block=8, teacher_block=16, weight=0.2, interval=(0.0, 0.2))
    config.optimizer.update(learning_rate=1e-4, clip_norm=1.0)
    config.ema.decay = 0.9999
    config.sampling.update(sampler="ode", steps=50, guidance_scale=2.0, preview_prompts=PREVIEWS)
    common.small_methods(config, standardise="none")
    return common.variant(config, variant)
