"""What a file of PyTorch tensors is: which family of model, of which size, and whether it is whole.

Families with the same backbone and tensor names:

    sit           SiT as SRA and REPA train it: t = 0 is data, the prediction is the velocity, C output channels
    dit           DiT, with or without SRA: DDPM, 2C output channels (noise and variance)
    sit_original  SiT as its authors train it: t = 1 is data, the velocity points the other way, 2C output channels of
                  which the last C are not used
    self_flow     Self-Flow as it was released: the original SiT's time and channels, patches as vectors (channel, row,
                  column), the head under the name `projector`

and with names of its own:

    mmdit         text to image as REPA trains it, with or without SRA's head: t = 0 is data, the prediction is the
                  velocity
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sra_jax.errors import UserError
from sra_jax.interop import mmdit
from sra_jax.interop.pytorch import (
    LABEL_TABLE,
    POSITION_TABLE,
    SRA_HEAD,
    expected_shapes,
    has_head,
    leaf_from_pytorch,
    leaves,
)
from sra_jax.interop.tensor_files import Shapes, TensorFile
from sra_jax.methods.registry import METHODS
from sra_jax.models.flops import Shape
from sra_jax.models.mmdit import MMDiTConfig
from sra_jax.models.transformer import TIME_FREQUENCIES, TransformerConfig, position_table
from sra_jax.values import INTEGER

FAMILIES = ("sit", "dit", "sit_original", "self_flow", "mmdit")
REVERSED = ("sit_original", "self_flow")
"""Those whose time runs from noise to data."""

PATCH_EMBEDDING = "x_embedder.proj.weight"
DROPPED = ("projectors.",)
"""Parts that other methods train beside the network; sampling does not need them."""

POSITION_TOLERANCE = 1e-2
"""The table is a constant; averaging it with itself in float32 for 10^5 steps moves an EMA's copy by up to 1e-3."""

REPA_HEAD_WIDTH, REPA_CONTEXT_LENGTH = 32, 77
"""Of REPA's MMDiT, whatever its size."""

ORIGINAL_PATHS = {"Linear": "linear", "GVP": "cosine"}
"""What the original SiT calls the paths; SRA and REPA write them as this project does."""

OTHER_PATHS = ("VP",)
TIME_LAYER = "t_embedder.mlp.0.weight"
DIFFUSERS = "transformer_blocks."
"""How names of diffusers' transformers begin."""

DIT_STEPS = 1000
"""In which SRA's DiT counts the teacher's interval; SiT's is a fraction of the time."""

NAMED = 5


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the weights of a file are.

    Attributes:
      family: one of `FAMILIES`.
      reason: how the family was found.
      network: the network's shape as it is in the file.
      head: whether a projection head is there.
      method: whose head it is, a name of `METHODS`; the likeliest method where there is none.
      dropped: names of tensors that are left out.
      classes: how the number of classes was found.
    """

    family: str
    reason: str
    network: Shape
    head: bool
    dropped: tuple[str, ...]
    classes: str
    method: str = "sra"

    def in_file(self, name: str) -> str:
        """The name in the file of a tensor that is known here as SRA's authors call it."""
        return name.replace(f"{SRA_HEAD}.", f"{METHODS[self.method].foreign_head}.", 1) if self.head else name

    def leaves(self) -> Iterator[tuple[str, list[str]]]:
        """Every leaf of the parameter tree: its path, and the tensors that it is made of, by SRA's authors' names."""
        if isinstance(self.network, MMDiTConfig):
            return mmdit.leaves(self.network.depth, mmdit.parts(self.network, self.head))
        return leaves(self.network.depth, self.head)

    def leaf(self, path: str, names: Sequence[str], tensors: Iterable[np.ndarray]) -> np.ndarray:
        """The leaf at `path`, in our layout, time and velocity, of the tensors of these names."""
        network = self.network
        if isinstance(network, MMDiTConfig):
            return mmdit.leaf_from_pytorch(path, tensors, network.heads)
        if self.family in REVERSED:
            tensors = (from_original_sit(name, t, network) for name, t in zip(names, tensors, strict=True))
        return leaf_from_pytorch(path, tensors, network.depth, network.heads)


def describe(
    file: TensorFile, family: str, heads: int | None, sizes: Mapping[str, Mapping[str, int]],
    num_classes: int | None = None, method: str = "auto", patch: int | None = None,
) -> Contents:
    """Read off the shapes what a file holds, and check that every tensor is there.

    Args:
      file: an opened checkpoint.
      family: one of `FAMILIES`, or "auto".
      heads: attention heads, which no tensor tells; None looks depth and width up in `sizes`.
      sizes: name -> depth, width and heads of the known sizes.
      num_classes: which tells whether the last row of the label table is the null label; None finds it out.
      method: whose the projection head is, a name of `METHODS`, or "auto".
      patch: side of a patch where the tensors do not tell (self_flow); None: 2.

    Raises:
      UserError: a missing, extra or misshapen tensor, by name; a family that does not fit or cannot be told; a size
        whose number of heads is not known.
    """
    dropped = tuple(name for name in file.shapes if name.startswith(DROPPED))
    shapes = {name: shape for name, shape in file.shapes.items() if name not in dropped}
    if family == "mmdit" or any(name.startswith(mmdit.BLOCKS) for name in shapes):
        return _describe_mmdit(file, shapes, family, heads, method, dropped)
    method = _method(file, shapes, method)
    foreign = METHODS[method].foreign_head
    shapes = {name.replace(f"{foreign}.", f"{SRA_HEAD}.", 1): shape for name, shape in shapes.items()}
    if self_flow := len(shapes.get(PATCH_EMBEDDING, ())) == 2:
        shapes[PATCH_EMBEDDING] = _patch_kernel(file, shapes[PATCH_EMBEDDING], patch or 2)
    network, classes = _network(file, shapes, num_classes)
    _check_prediction(file)
    if self_flow or family == "self_flow":
        if not self_flow or family not in ("auto", "self_flow"):
            axes = len(file.shapes.get(PATCH_EMBEDDING, ()))
            raise UserError(
                f"--family={family} does not fit {file.path}: its {PATCH_EMBEDDING} has {axes} axes; that of Self-Flow "
                "has 2, those of the others 4"
            )
        family, reason = "self_flow", "patches as vectors"
    else:
        family, reason = _family(file, shapes, network, family)
    head = has_head(shapes)
    _compare(file, shapes, expected_shapes(network, head), "DiT or SiT")
    depth, width = network.depth, network.width
    if heads is None:
        known = [size["heads"] for size in sizes.values() if (size["depth"], size["width"]) == (depth, width)]
        if not known:
            raise UserError(
                f"{file.path} has {depth} blocks of width {width}, which is none of {', '.join(sizes)}; the number of "
                "attention heads cannot be read from tensors: give --heads"
            )
        heads = known[0]
    _check_heads(file, width, heads)
    return Contents(family, reason, dataclasses.replace(network, heads=heads), head, dropped, classes, method)


def _check_heads(file: TensorFile, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise UserError(f"--heads={heads} does not divide the width {width} of {file.path}")


def _describe_mmdit(
    file: TensorFile, shapes: Shapes, family: str, heads: int | None, method: str, dropped: tuple[str, ...]
) -> Contents:
    """As `describe`, of a text-to-image model. A caption's tokens are not told by tensors; REPA's are 77."""
    kind, first = "MMDiT", f"{mmdit.BLOCKS}0.x_block.mlp.fc1.weight"
    if family not in ("auto", "mmdit"):
        raise UserError(f"--family={family} does not fit {file.path}: its joint_blocks are those of an MMDiT")
    if method not in ("auto", "sra"):
        raise UserError(f"--method={method} does not fit {file.path}: a file of an MMDiT has SRA's head or none")
    width, channels, patch, _ = _shape(file, shapes, PATCH_EMBEDDING, 4, kind)
    if heads is None:  # REPA's class gives each head 32 channels
        heads = max(1, width // REPA_HEAD_WIDTH)
    _check_heads(file, width, heads)
    network = MMDiTConfig(
        input_size=_grid(file, shapes, kind) * patch, channels=channels, patch=patch,
        output_channels=_shape(file, shapes, "final_layer.linear.weight", 2, kind)[0] // patch**2,
        depth=_depth(file, shapes, mmdit.BLOCKS), width=width, heads=heads,
        context_width=_shape(file, shapes, "context_embedder.weight", 2, kind)[1], context_length=REPA_CONTEXT_LENGTH,
        mlp_ratio=_shape(file, shapes, first, 2, kind)[0] / width, pooled="y_embedder" in mmdit.parts_of(shapes),
    )  # fmt: skip
    if network.depth < 2:
        raise UserError(f"{file.path} has one block; an MMDiT has at least two, for its last one is a special one")
    _check_prediction(file)
    head = has_head(shapes)
    _compare(file, shapes, mmdit.expected_shapes(network, head), kind)
    return Contents("mmdit", "its joint_blocks", network, head, dropped, "told captions")


def _method(file: TensorFile, shapes: Shapes, asked: str) -> str:
    """Whose the projection head is."""
    if asked != "auto":
        return asked
    known = [name for name, method in METHODS.items() if method.foreign_head]
    for name in known:
        if any(argument in file.arguments for argument in METHODS[name].foreign_arguments):
            return name
    for name in known:
        foreign = METHODS[name].foreign_head
        if foreign != SRA_HEAD and any(tensor.startswith(f"{foreign}.") for tensor in shapes):
            return name
    return "sra"


def _patch_kernel(file: TensorFile, shape: tuple[int, ...], patch: int) -> tuple[int, ...]:
    """The shape (D,C,p,p) of a patch embedding that is written as (D,C*p*p)."""
    width, inputs = shape
    channels, rest = divmod(inputs, patch**2)
    if rest:
        raise UserError(f"{file.path}: its patches have {inputs} entries, no multiple of {patch}x{patch}: give --patch")
    return width, channels, patch, patch


def _network(file: TensorFile, shapes: Shapes, asked_classes: int | None) -> tuple[TransformerConfig, str]:
    """The shape that the tensors speak of, with one head; how the number of classes was found."""
    if foreign := next((name for name in shapes if name.startswith(DIFFUSERS)), None):
        raise UserError(
            f"{file.path} has the names of a transformer of diffusers ({foreign}), which counts time by other "
            "frequencies than DiT and SiT: give the authors' own file, such as DiT-XL-2-256x256.pt"
        )

    kind = "DiT or SiT"
    width, channels, patch, _ = _shape(file, shapes, PATCH_EMBEDDING, 4, kind)
    grid, depth = _grid(file, shapes, kind), _depth(file, shapes, "blocks.")
    outputs = _shape(file, shapes, "final_layer.linear.weight", 2, kind)[0]
    rows = _shape(file, shapes, LABEL_TABLE[0], 2, kind)[0]
    classes, null_label, reason = _classes(file, rows, asked_classes)
    network = TransformerConfig(
        input_size=grid * patch, channels=channels, output_channels=outputs // patch**2,
        num_classes=classes, null_label=null_label, patch=patch,
        depth=depth, width=width, heads=1,
        mlp_ratio=_shape(file, shapes, "blocks.0.mlp.fc1.weight", 2, kind)[0] / width,
    )  # fmt: skip
    return network, reason


def _shape(file: TensorFile, shapes: Shapes, name: str, axes: int, kind: str) -> tuple[int, ...]:
    """Of a tensor that tells a size; raises a `UserError` where it is not there or has another number of axes."""
    if name not in shapes:
        close = difflib.get_close_matches(name, shapes, n=1)
        there = f"; there is {close[0]}" if close else f"; it holds {', '.join(list(shapes)[:NAMED])}"
        raise UserError(f"{file.path} has no tensor {name}, so it is no {kind}{there}")
    if len(shapes[name]) != axes:
        raise UserError(f"{file.path}: tensor {name} has shape {shapes[name]} instead of {axes} axes")
    return shapes[name]


def _grid(file: TensorFile, shapes: Shapes, kind: str) -> int:
    """Side of the position table, in tokens."""
    tokens = _shape(file, shapes, POSITION_TABLE, 3, kind)[1]
    grid = math.isqrt(tokens)
    if grid**2 != tokens:
        raise UserError(f"{file.path}: tensor {POSITION_TABLE} has {tokens} tokens, not a square number")
    return grid


def _depth(file: TensorFile, shapes: Shapes, prefix: str) -> int:
    """Number of blocks that names with this prefix speak of."""
    numbers = [name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)]
    depth = 1 + max((int(number) for number in numbers if INTEGER.fullmatch(number)), default=0)
    if depth > len(shapes):
        raise UserError(f"{file.path} names a block {depth - 1} and has {len(shapes)} tensors: it is not whole")
    return depth


def _classes(file: TensorFile, rows: int, asked: int | None) -> tuple[int, bool, str]:
    """(classes, whether there is a null label, how that was found) of a label table of so many rows.

    DiT and SiT leave the null label out of a model that is trained without label dropout; the table does not tell.
    """
    told = file.arguments.get("num_classes")
    for count, source in ((asked, "as asked"), (told, "its arguments")):
        if isinstance(count, int) and count > 0 and rows in (count, count + 1):
            return count, rows > count, source
        if count is not None and source == "as asked":
            raise UserError(
                f"{file.path}: its label table of {rows} rows is not that of {count} classes, as asked, but of "
                f"{rows - 1} classes and a null label, or of {rows} and none"
            )
    if rows % 10 == 0 or rows == 1:
        return rows, False, f"a round number of rows: --num_classes={rows - 1} if the last one is the null label"
    return rows - 1, True, "the last row of the table is the null label"


def _check_prediction(file: TensorFile) -> None:
    """Raises `UserError` where the arguments say that the network predicts what ours does not, or on another path."""
    prediction, path = file.arguments.get("prediction"), file.arguments.get("path_type")
    if isinstance(prediction, str) and prediction not in ("v", "velocity"):
        raise UserError(
            f"{file.path} was trained to predict the {prediction} (its argument prediction); SiT's here predict the "
            "velocity, and weights for one are none for the other"
        )
    if path in OTHER_PATHS:
        raise UserError(
            f"{file.path} was trained on the path {path} (its argument path_type); allowed: "
            f"{', '.join(ORIGINAL_PATHS)} of the original SiT, linear and cosine of SRA and REPA"
        )


def _family(file: TensorFile, shapes: Shapes, network: TransformerConfig, asked: str) -> tuple[str, str]:
    channels, outputs = network.channels, network.output_channels
    if outputs not in (channels, 2 * channels):
        raise UserError(
            f"{file.path}: tensor final_layer.linear.weight makes {outputs} output channels for {channels} latent "
            f"channels; SiT has {channels}, DiT and the original SiT have {2 * channels}"
        )
    original = file.arguments.get("path_type") in (*ORIGINAL_PATHS, *OTHER_PATHS)
    if original and asked in ("sit", "dit"):
        raise UserError(
            f"--family={asked} does not fit {file.path}: its argument path_type={file.arguments['path_type']} is of "
            "the original SiT, --family=sit_original"
        )
    if asked != "auto":
        fitting = {"sit": (channels,), "dit": (2 * channels,), "sit_original": (channels, 2 * channels)}[asked]
        if outputs not in fitting:
            others = "sit" if outputs == channels else "dit or sit_original"
            raise UserError(
                f"--family={asked} does not fit {file.path}: its final_layer.linear.weight makes {outputs} channels of "
                f"{channels}, as in {others}"
            )
        return asked, "as asked"
    if original:
        return "sit_original", f"its argument path_type={file.arguments['path_type']}"
    if outputs == channels:
        return "sit", f"{outputs} output channels"
    if has_head(shapes):
        return "dit", f"{outputs} output channels and SRA's head"
    told = {"its arguments": str(file.arguments.get("model", "")), "its name": file.path.name}
    for source, name in told.items():
        for word, family in (("dit", "dit"), ("sit", "sit_original")):
            if name.lower().startswith(word):
                return family, f"{outputs} output channels and {source} ({name})"
    raise UserError(
        f"{file.path} has {outputs} output channels for {channels} latent channels and no SRA head: DiT and the "
        "original SiT have the very same tensors. Say which it is: --family=dit or --family=sit_original"
    )


def _compare(file: TensorFile, found: Shapes, expected: Shapes, kind: str) -> None:
    """Raises `UserError` naming the tensors that are missing, extra or misshapen."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of the wrong shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    lines = [
        f"{kind}: {', '.join(names[:NAMED])}" + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise UserError(f"{file.path} is not a whole {kind}. Tensors\n  " + "\n  ".join(lines))


def check_positions(file: TensorFile, network: Shape) -> None:
    """Raises `UserError` where the position table is not the sin-cos table, the only one that the model knows."""
    expected = position_table(network.width, network.input_size // network.patch)[None]
    for group in file.groups:
        if group in ("params", "ema"):
            (found,) = file.read(group, [POSITION_TABLE])
            if not np.abs(found - expected).max() <= POSITION_TOLERANCE:
                raise UserError(
                    f"{file.path}: tensor {POSITION_TABLE} of {group} is not the fixed 2-D sin-cos table of DiT, SiT "
                    "and MMDiT; models with other positions are not supported"
                )


def from_original_sit(name: str, tensor: np.ndarray, network: TransformerConfig) -> np.ndarray:
    """A tensor of the original SiT, changed so that the network takes our time and predicts our velocity.

    The original network g runs from noise at t = 0 to data at t = 1 and predicts data - noise; ours is
    f(x, t) = -g(x, 1 - t). Both changes are linear in weights, so that they are exact but for one rounding: the sign
    goes into the final layer, whose unused channels are dropped, and with frequencies w

        cos(w (1 - t)) = cos w cos wt + sin w sin wt
        sin(w (1 - t)) = sin w cos wt - cos w sin wt

    goes into the first layer of the time network, computed in float64.

    Args:
      name: the tensor's.
      tensor: float32, as in the file.
      network: the shape as in the file, with 2C (or C) output channels.
    """
    if name == TIME_LAYER:
        return _time_reversed(tensor)
    if name == PATCH_EMBEDDING and tensor.ndim == 2:  # of Self-Flow
        return tensor.reshape(network.width, network.channels, network.patch, network.patch)
    if name.startswith("final_layer.linear."):
        by_channel = tensor.reshape(network.patch**2, network.output_channels, *tensor.shape[1:])
        return -by_channel[:, : network.channels].reshape(-1, *tensor.shape[1:])
    return tensor


def to_original_sit(name: str, tensor: np.ndarray, network: TransformerConfig, flat_patches: bool) -> np.ndarray:
    """The inverse of `from_original_sit`: the last C of 2C output channels are zeros.

    Args:
      name: the tensor's.
      tensor: float32, under our time and sign, in PyTorch's layout.
      network: the run's shape, with C output channels.
      flat_patches: whether the patch embedding is written as a matrix, as in Self-Flow.
    """
    if name == TIME_LAYER:
        return _time_reversed(tensor)  # a reflection: its own inverse
    if name == PATCH_EMBEDDING and flat_patches:
        return tensor.reshape(network.width, -1)
    if name.startswith("final_layer.linear."):
        by_channel = -tensor.reshape(network.patch**2, network.channels, *tensor.shape[1:])
        return np.concatenate([by_channel, np.zeros_like(by_channel)], axis=1).reshape(-1, *tensor.shape[1:])
    return tensor


def _time_reversed(kernel: np.ndarray) -> np.ndarray:
    """The first kernel of the time network (D,256), for features of 1 - t in place of t, or the other way round."""
    half = TIME_FREQUENCIES // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half)
    of_cos, of_sin = np.split(kernel.astype(np.float64), 2, axis=1)
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    return np.concatenate([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], axis=1).astype(np.float32)


def arguments_to_config(arguments: Mapping[str, Any], section: str = "alignment") -> tuple[dict[str, Any], list[str]]:
    """Config values, by dotted key, of the command line that the authors of SRA and SiT save with their checkpoints.

    Arguments that are absent or of another kind are left to the recipe.

    Args:
      arguments: by name.
      section: where the method has its keys.

    Returns:
      The values, and a line for each setting that has no like here.
    """
    values: dict[str, Any] = {}
    lost: list[str] = []

    def take(argument: str, key: str, kind: type) -> None:
        value = arguments.get(argument)
        if isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool):
            values[key] = kind(value)

    take("block_out_s", f"{section}.student_block", int)
    take("block_out_t", f"{section}.teacher_block", int)
    take("learning_rate", "optimizer.learning_rate", float)
    take("adam_beta1", "optimizer.b1", float)
    take("adam_beta2", "optimizer.b2", float)
    take("adam_epsilon", "optimizer.eps", float)
    take("adam_weight_decay", "optimizer.weight_decay", float)
    take("max_grad_norm", "optimizer.clip_norm", float)
    take("path_type", "process.path", str)
    take("t_max", f"{section}.interval", float)
    if f"{section}.interval" in values:
        most = values[f"{section}.interval"]
        values[f"{section}.interval"] = (0.0, most / DIT_STEPS if most > 1 else most)
    if (path := values.get("process.path")) is not None:
        values["process.path"] = ORIGINAL_PATHS.get(path, path)
    if arguments.get("weighting") == "lognormal":
        if values.get("process.path", "linear") == "linear":
            values["process.time_distribution"] = "logit_normal"
        else:
            lost.append(
                "its times were drawn with weighting=lognormal, which on the cosine path is none of "
                "process.time_distribution: uniform is kept"
            )
    loss = arguments.get("loss_type")
    if loss in ("l1", "l2"):
        values[f"{section}.distance"] = loss
    elif loss == "cos":  # over tokens, not features, in their code; of constant weight
        values |= {f"{section}.distance": "cosine_tokens", f"{section}.weight": 0.5,
                   f"{section}.weight_schedule": "constant"}  # fmt: skip
    return values, lost
