"""The authors' PyTorch tensor names (those of DiT and SiT, plus `ap_head`) and our parameter trees, both ways.

Arrays only: nothing here needs PyTorch. Linear weights are (out, in) there and (in, out) here; blocks are separate
there and stacked along a leading depth axis here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sra_jax.models.transformer import TIME_FREQUENCIES, TransformerConfig, position_table

POSITION_TABLE = "pos_embed"
SRA_HEAD = "ap_head"

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


def to_ours(path: str, name: str, array: np.ndarray, heads: int) -> np.ndarray:
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


def to_theirs(path: str, name: str, array: np.ndarray, channels: int) -> np.ndarray:
    """The inverse of `to_ours`; `channels` are those of the latents."""
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


def insert(tree: Tree, path: str, value: Any) -> None:
    """Put a leaf at "a/b/c", making what lies above it."""
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def walk(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf at "a/b/c"."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def depth_of(tensors: Mapping[str, Any]) -> int:
    """Number of blocks named in a state dict."""
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))


def leaves(depth: int, head: bool) -> Iterator[tuple[str, list[str]]]:
    """Every leaf of a parameter tree: its path, and the tensors that it is made of, one a block where it is stacked."""
    kinds = (("weight", "kernel"), ("bias", "bias"))
    for theirs, path in LINEARS.items():
        if head or not path.startswith("head/"):
            for name, ours in kinds:
                yield f"{path}/{ours}", [f"{theirs}.{name}"]
    yield LABEL_TABLE[1], [LABEL_TABLE[0]]
    for theirs, path in BLOCK_LINEARS.items():
        for name, ours in kinds:
            yield f"model/blocks/{path}/{ours}", [f"blocks.{i}.{theirs}.{name}" for i in range(depth)]


def leaf_from_pytorch(path: str, tensors: Iterable[np.ndarray], depth: int, heads: int) -> np.ndarray:
    """The leaf at `path`, in our layout, of the tensors that `leaves` names for it; they are taken one by one."""
    parent, _, ours = path.rpartition("/")
    tensors = iter(tensors)
    first = next(tensors)
    if ours == "embedding":
        return first
    name = "weight" if ours == "kernel" else "bias"
    first = to_ours(parent, name, first, heads)
    if not parent.startswith("model/blocks/"):
        return first
    stacked = np.empty((depth, *first.shape), first.dtype)
    stacked[0] = first
    for i, tensor in enumerate(tensors, start=1):
        stacked[i] = to_ours(parent, name, tensor, heads)
    return stacked


def has_head(names: Iterable[str]) -> bool:
    """Whether a state dict of these names has the projection head of SRA."""
    return any(name.startswith(f"{SRA_HEAD}.") for name in names)


def params_from_pytorch(tensors: Mapping[str, np.ndarray], heads: int) -> Tree:
    """A state dict -> {"model": ..., "head": ...} (no head where there is no `ap_head`), NumPy arrays.

    Args:
      tensors: the state dict as arrays. The position table is not a parameter here and is left out.
      heads: attention heads; a state dict does not tell.

    Raises:
      KeyError: a tensor is missing.
    """
    tree: Tree = {}
    depth = depth_of(tensors)
    for path, names in leaves(depth, has_head(tensors)):
        insert(tree, path, leaf_from_pytorch(path, (tensors[name] for name in names), depth, heads))
    return tree


def expected_shapes(network: TransformerConfig, head: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a state dict of this network, in the order of PyTorch's parameters."""
    width, hidden = network.width, int(network.width * network.mlp_ratio)
    outputs = network.patch**2 * network.output_channels
    linears = {
        "t_embedder.mlp.0": (width, TIME_FREQUENCIES), "t_embedder.mlp.2": (width, width),
        "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden), "adaLN_modulation.1": (6 * width, width),
        "ap_head.linear1": (2 * width, width), "ap_head.linear2": (width, 2 * width),
        "final_layer.linear": (outputs, width), "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {POSITION_TABLE: (1, network.tokens, width)}

    def add(name: str, kernel: tuple[int, ...]) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = kernel, (kernel[0],)

    add("x_embedder.proj", (width, network.channels, network.patch, network.patch))
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2"):
        add(name, linears[name])
    shapes[LABEL_TABLE[0]] = (network.label_rows, width)
    for i in range(network.depth):
        for name in BLOCK_LINEARS:
            add(f"blocks.{i}.{name}", linears[name])
    if head:
        for name in ("ap_head.linear1", "ap_head.linear2"):
            add(name, linears[name])
    for name in ("final_layer.linear", "final_layer.adaLN_modulation.1"):
        add(name, linears[name])
    return shapes


def pytorch_from_params(params: Mapping[str, Any], channels: int, input_size: int) -> dict[str, np.ndarray]:
    """The inverse of `params_from_pytorch`, with the position table.

    Args:
      params: {"model": ...} with or without "head"; any arrays.
      channels: channels of the latents.
      input_size: height and width of the latents.
    """
    to_numpy: Callable[[Any], np.ndarray] = np.asarray
    kernel = to_numpy(walk(params, "model/patch_embedding/kernel"))
    patch = round((kernel.shape[0] // channels) ** 0.5)
    depth = len(walk(params, "model/blocks/modulation/bias"))
    tensors = {POSITION_TABLE: position_table(kernel.shape[1], input_size // patch)[None]}
    for path, names in leaves(depth, "head" in params):
        array = to_numpy(walk(params, path))
        parent, _, ours = path.rpartition("/")
        if ours == "embedding":
            tensors[names[0]] = array
            continue
        layers = array if parent.startswith("model/blocks/") else array[None]
        for name, layer in zip(names, layers, strict=True):
            tensors[name] = to_theirs(parent, name.rpartition(".")[2], layer, channels)
    return tensors
