"""The authors' PyTorch tensor names (those of DiT and SiT, plus `ap_head`) and our parameter trees, both ways.

Arrays only: nothing here needs PyTorch. Linear weights are (out, in) there and (in, out) here; blocks are separate
there and stacked along a leading depth axis here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sra_jax.models.transformer import position_table

POSITION_TABLE = "pos_embed"

LINEARS = {
    "x_embedder.proj": "model/patch_embedding",
    "t_embedder.mlp.0": "model/time_embedding/hidden",
    "t_embedder.mlp.2": "model/time_embedding/out",
    "final_layer.linear": "model/final/linear",
    "final_layer.adaLN_modulation.1": "model/final/modulation",
    "ap_head.linear1": "head/hidden",
    "ap_head.linear2": "head/out",
}
BLOCK_LINEARS = {
    "attn.qkv": "attention/qkv",
    "attn.proj": "attention/out",
    "mlp.fc1": "mlp/hidden",
    "mlp.fc2": "mlp/out",
    "adaLN_modulation.1": "modulation",
}
LABEL_TABLE = ("y_embedder.embedding_table.weight", "model/label_embedding/embedding")

Tree = dict[str, Any]


def _to_ours(path: str, name: str, array: np.ndarray, heads: int) -> np.ndarray:
    """One tensor of a linear layer at `path`, `name` weight or bias, in our layout."""
    if name == "weight":
        if path == "model/patch_embedding":
            return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])  # (D,C,p,p) -> (p*p*C, D)
        array = array.T
    if path.endswith("attention/qkv"):
        return array.reshape(*array.shape[:-1], 3, heads, -1)
    if path.endswith("attention/out") and name == "weight":
        return array.reshape(heads, -1, array.shape[-1])
    return array


def _to_theirs(path: str, name: str, array: np.ndarray, channels: int) -> np.ndarray:
    """The inverse of `_to_ours`; `channels` are those of the latents."""
    if path.endswith("attention/qkv"):
        array = array.reshape(*array.shape[:-3], -1)
    if path.endswith("attention/out") and name == "weight":
        array = array.reshape(-1, array.shape[-1])
    if name == "bias":
        return array
    if path == "model/patch_embedding":
        patch = round((array.shape[0] // channels) ** 0.5)
        return array.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)
    return array.T


def _insert(tree: Tree, path: str, value: np.ndarray) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _walk(tree: Mapping[str, Any], path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def depth_of(tensors: Mapping[str, Any]) -> int:
    """Number of blocks named in a state dict."""
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))


def params_from_pytorch(tensors: Mapping[str, np.ndarray], heads: int) -> Tree:
    """A state dict -> {"model": ..., "head": ...} (no head where there is no `ap_head`), NumPy arrays.

    Args:
      tensors: the state dict as arrays. The position table is not a parameter here and is left out.
      heads: attention heads; a state dict does not tell.

    Raises:
      KeyError: a tensor is missing.
    """
    tree: Tree = {}
    has_head = any(name.startswith("ap_head.") for name in tensors)
    for theirs, path in LINEARS.items():
        if path.startswith("head/") and not has_head:
            continue
        for name, ours in (("weight", "kernel"), ("bias", "bias")):
            _insert(tree, f"{path}/{ours}", _to_ours(path, name, tensors[f"{theirs}.{name}"], heads))
    _insert(tree, LABEL_TABLE[1], tensors[LABEL_TABLE[0]])
    for theirs, path in BLOCK_LINEARS.items():
        for name, ours in (("weight", "kernel"), ("bias", "bias")):
            layers = [
                _to_ours(path, name, tensors[f"blocks.{i}.{theirs}.{name}"], heads) for i in range(depth_of(tensors))
            ]
            _insert(tree, f"model/blocks/{path}/{ours}", np.stack(layers))
    return tree


def pytorch_from_params(params: Mapping[str, Any], channels: int, input_size: int) -> dict[str, np.ndarray]:
    """The inverse of `params_from_pytorch`, with the position table.

    Args:
      params: {"model": ...} with or without "head"; any arrays.
      channels: channels of the latents.
      input_size: height and width of the latents.
    """
    to_numpy: Callable[[Any], np.ndarray] = np.asarray
    kernel = to_numpy(_walk(params, "model/patch_embedding/kernel"))
    patch = round((kernel.shape[0] // channels) ** 0.5)
    tensors = {POSITION_TABLE: position_table(kernel.shape[1], input_size // patch)[None]}
    for theirs, path in LINEARS.items():
        if path.startswith("head/") and "head" not in params:
            continue
        for name, ours in (("weight", "kernel"), ("bias", "bias")):
            array = to_numpy(_walk(params, f"{path}/{ours}"))
            tensors[f"{theirs}.{name}"] = _to_theirs(path, name, array, channels)
    tensors[LABEL_TABLE[0]] = to_numpy(_walk(params, LABEL_TABLE[1]))
    for theirs, path in BLOCK_LINEARS.items():
        for name, ours in (("weight", "kernel"), ("bias", "bias")):
            for i, layer in enumerate(to_numpy(_walk(params, f"model/blocks/{path}/{ours}"))):
                tensors[f"blocks.{i}.{theirs}.{name}"] = _to_theirs(path, name, layer, channels)
    return tensors
