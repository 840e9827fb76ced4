"""The tensor names of REPA's text-to-image models (MMDiT, plus SRA's `ap_head`) and our parameter trees, both ways.

Layouts are those of `sra_jax.interop.pytorch`. The last block's text side (`context_block`) has no output there either.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sra_jax.interop import pytorch
from sra_jax.interop.pytorch import POSITION_TABLE, Tree, insert, to_ours, to_theirs, walk
from sra_jax.models.mmdit import MMDiTConfig
from sra_jax.models.transformer import TIME_FREQUENCIES, position_table

LINEARS = {
    "x_embedder.proj": "model/patch_embedding",
    "t_embedder.mlp.0": "model/time_embedding/hidden",
    "t_embedder.mlp.2": "model/time_embedding/out",
    "y_embedder.mlp.0": "model/pooled_embedding/hidden",
    "y_embedder.mlp.2": "model/pooled_embedding/out",
    "context_embedder": "model/context_embedding",
    "final_layer.linear": "model/final/linear",
    "final_layer.adaLN_modulation.1": "model/final/modulation",
    "ap_head.linear1": "head/hidden",
    "ap_head.linear2": "head/out",
}
BLOCKS = "joint_blocks."
"""How names of blocks begin."""

STREAMS = {"context_block": "text", "x_block": "image"}
STREAM_LINEARS = pytorch.BLOCK_LINEARS
ENTRANCE_LINEARS = ("attn.qkv", "adaLN_modulation.1")
"""What the text side of the last block has."""

OPTIONAL = {"y_embedder": "model/pooled_embedding/", "ap_head": "head/"}
"""Parts that a model may lack, and the paths of their layers."""


def depth_of(tensors: Mapping[str, Any]) -> int:
    """Number of joint blocks named in a state dict."""
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("joint_blocks."))


def parts_of(names: Mapping[str, Any]) -> frozenset[str]:
    """Those of `OPTIONAL` that a state dict has."""
    return frozenset(part for part in OPTIONAL if any(name.startswith(f"{part}.") for name in names))


def layers(depth: int, parts: frozenset[str]) -> Iterator[tuple[str, list[str]]]:
    """Every linear layer: its path, and its names there, one a block where it is stacked.

    Args:
      depth: number of joint blocks.
      parts: those of `OPTIONAL` that are there.
    """
    left_out = tuple(path for part, path in OPTIONAL.items() if part not in parts)
    for theirs, path in LINEARS.items():
        if not path.startswith(left_out):
            yield path, [theirs]
    for stream, ours in STREAMS.items():
        for theirs, path in STREAM_LINEARS.items():
            yield f"model/blocks/{ours}/{path}", [f"joint_blocks.{i}.{stream}.{theirs}" for i in range(depth - 1)]
            if ours == "image" or theirs in ENTRANCE_LINEARS:
                yield f"model/last_block/{ours}/{path}", [f"joint_blocks.{depth - 1}.{stream}.{theirs}"]


def parts(network: MMDiTConfig, head: bool) -> frozenset[str]:
    """Those of `OPTIONAL` that a network has, with or without SRA's head."""
    return frozenset(part for part, there in (("y_embedder", network.pooled), ("ap_head", head)) if there)


def _is_stacked(path: str) -> bool:
    return path.startswith(("model/blocks/", "model/last_block/"))


def leaves(depth: int, parts: frozenset[str]) -> Iterator[tuple[str, list[str]]]:
    """Every leaf of a parameter tree: its path, and the tensors that it is made of, one a block where it is stacked."""
    for path, names in layers(depth, parts):
        for kind, ours in (("weight", "kernel"), ("bias", "bias")):
            yield f"{path}/{ours}", [f"{name}.{kind}" for name in names]


def leaf_from_pytorch(path: str, tensors: Iterable[np.ndarray], heads: int) -> np.ndarray:
    """The leaf at `path`, in our layout, of the tensors that `leaves` names for it."""
    parent, _, ours = path.rpartition("/")
    found = [to_ours(parent, "weight" if ours == "kernel" else "bias", tensor, heads) for tensor in tensors]
    return np.stack(found) if _is_stacked(path) else found[0]


def params_from_pytorch(tensors: Mapping[str, np.ndarray], heads: int) -> Tree:
    """A state dict -> {"model": ..., "head": ...} (no head where there is no `ap_head`), NumPy arrays.

    Args:
      tensors: the state dict as arrays. The position table is not a parameter here and is left out, as are REPA's
        `projectors`.
      heads: attention heads; a state dict does not tell.

    Raises:
      KeyError: a tensor is missing.
    """
    tree: Tree = {}
    for path, names in leaves(depth_of(tensors), parts_of(tensors)):
        insert(tree, path, leaf_from_pytorch(path, (tensors[name] for name in names), heads))
    return tree


def pytorch_from_params(params: Mapping[str, Any], channels: int, grid: int) -> dict[str, np.ndarray]:
    """The inverse of `params_from_pytorch`, with the position table.

    Args:
      params: {"model": ...} with or without "head"; any arrays.
      channels: channels of the latents.
      grid: side of the position table, in tokens.
    """
    depth = 1 + len(walk(params, "model/blocks/image/modulation/bias"))
    there = {"y_embedder": "pooled_embedding" in params["model"], "ap_head": "head" in params}
    width = walk(params, "model/patch_embedding/kernel").shape[1]
    tensors = {POSITION_TABLE: position_table(width, grid)[None]}
    for path, names in layers(depth, frozenset(part for part, has in there.items() if has)):
        for kind, ours in (("weight", "kernel"), ("bias", "bias")):
            array = np.asarray(walk(params, f"{path}/{ours}"))
            for name, layer in zip(names, array if _is_stacked(path) else array[None], strict=True):
                tensors[f"{name}.{kind}"] = to_theirs(path, kind, layer, channels)
    return tensors


def expected_shapes(network: MMDiTConfig, head: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a state dict of this network."""
    width, hidden = network.width, int(network.width * network.mlp_ratio)
    outputs = network.patch**2 * network.output_channels
    matrices = {
        "x_embedder.proj": (width, network.channels, network.patch, network.patch),
        "t_embedder.mlp.0": (width, TIME_FREQUENCIES), "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, network.context_width), "y_embedder.mlp.2": (width, width),
        "context_embedder": (width, network.context_width), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
        "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden), "adaLN_modulation.1": (6 * width, width),
        "ap_head.linear1": (2 * width, width), "ap_head.linear2": (width, 2 * width),
        "final_layer.linear": (outputs, width), "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {POSITION_TABLE: (1, network.tokens, width)}
    for path, names in layers(network.depth, parts(network, head)):
        for name in names:
            matrix = matrices[name.split("_block.", 1)[-1]]
            if path == "model/last_block/text/modulation":
                matrix = (2 * width, width)
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = matrix, matrix[:1]
    return shapes
