"""State dicts of random numbers with the true names and shapes."""

import numpy as np

from sra_jax.models.transformer import position_table

TINY = {"input_size": 8, "channels": 4, "classes": 10, "patch": 2, "depth": 3, "width": 32}


def shapes(
    *, outputs: int, head: bool, input_size: int, channels: int, classes: int, patch: int, depth: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the state dicts of DiT, SiT and SRA list them."""
    layers = {
        "x_embedder.proj": (width, channels, patch, patch), "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
    }  # fmt: skip
    for i in range(depth):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }  # fmt: skip
    if head:
        layers |= {"ap_head.linear1": (2 * width, width), "ap_head.linear2": (width, 2 * width)}
    layers |= {
        "final_layer.linear": (patch * patch * outputs, width), "final_layer.adaLN_modulation.1": (2 * width, width)
    }  # fmt: skip
    result = {"pos_embed": (1, (input_size // patch) ** 2, width)}
    for name, shape in layers.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        if name == "t_embedder.mlp.2":
            result["y_embedder.embedding_table.weight"] = (classes + 1, width)
    return result


def random_tensors(seed: int, *, outputs: int = 4, head: bool = True, **size: int) -> dict[str, np.ndarray]:
    """Float32 tensors of spread 0.1, but for the true position table; sizes that are not given are `TINY`'s."""
    size = TINY | size
    generator = np.random.default_rng(seed)
    tensors = {
        name: (0.1 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes(outputs=outputs, head=head, **size).items()
    }
    tensors["pos_embed"] = position_table(size["width"], size["input_size"] // size["patch"])[None]
    return tensors


def mmdit_shapes(
    *, head: bool, input_size: int, channels: int, patch: int, depth: int, width: int, context: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the state dict of REPA's MMDiT lists them, with or without SRA's head."""
    layers = {
        "x_embedder.proj": (width, channels, patch, patch), "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width), "context_embedder": (width, context),
    }  # fmt: skip
    for i in range(depth):
        for stream in ("context_block", "x_block"):
            ends = stream == "context_block" and i == depth - 1  # nothing reads the text after the last attention
            layers[f"joint_blocks.{i}.{stream}.attn.qkv"] = (3 * width, width)
            if not ends:
                layers |= {
                    f"joint_blocks.{i}.{stream}.attn.proj": (width, width),
                    f"joint_blocks.{i}.{stream}.mlp.fc1": (4 * width, width),
                    f"joint_blocks.{i}.{stream}.mlp.fc2": (width, 4 * width),
                }
            layers[f"joint_blocks.{i}.{stream}.adaLN_modulation.1"] = ((2 if ends else 6) * width, width)
    layers |= {
        "final_layer.linear": (patch * patch * channels, width), "final_layer.adaLN_modulation.1": (2 * width, width)
    }  # fmt: skip
    if head:
        layers |= {"ap_head.linear1": (2 * width, width), "ap_head.linear2": (width, 2 * width)}
    result = {"pos_embed": (1, (input_size // patch) ** 2, width)}
    for name, shape in layers.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result


def random_mmdit(seed: int, *, head: bool, **size: int) -> dict[str, np.ndarray]:
    """As `random_tensors`, of REPA's MMDiT."""
    generator = np.random.default_rng(seed)
    tensors = {
        name: (0.1 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in mmdit_shapes(head=head, **size).items()
    }
    tensors["pos_embed"] = position_table(size["width"], size["input_size"] // size["patch"])[None]
    return tensors
