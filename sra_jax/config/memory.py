"""What a recipe's step takes of a device's memory, by formula."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from sra_jax.config import objects
from sra_jax.config.checks import check
from sra_jax.errors import UserError
from sra_jax.models.flops import matrix_parameters
from sra_jax.models.stack import segment_count


def kept_by_blocks(config: ConfigDict, examples: int, parts: int = 1) -> float:
    """Bytes that the backward pass keeps of every block, at least.

    Args:
      config: the recipe.
      examples: that a device has at a time.
      parts: devices over which a block's products are split.
    """
    shape = objects.transformer_of(config)
    kept = 4.0  # a block's input, float32
    if shape.remat in ("dots", "gelu", "none"):
        hidden = shape.mlp_ratio * (1 if shape.remat == "dots" else 2)
        kept += (6 + hidden) / parts * jnp.dtype(shape.dtype).itemsize  # qkv, attention, both branches, MLP
    blocks = segment_count(shape.depth) if shape.remat == "full" else shape.depth
    blocks -= objects.tells_captions(config)  # the last block of an MMDiT keeps less, as its text ends there
    return blocks * examples * shape.attended * shape.width * kept


def held_by_a_step(config: ConfigDict) -> int:
    """Bytes that a step holds beside the state, where one device computes all of it: gradients, and what blocks keep.

    About, and rather too few. No device is touched; 0 where the config does not pass its checks.
    """
    try:
        check(config, objects.fewest_devices(config))
    except UserError:
        return 0
    gradients = 4 * matrix_parameters(objects.transformer_of(config))  # float32
    return int(gradients + kept_by_blocks(config, config.batch_size // objects.accumulation_of(config)))
