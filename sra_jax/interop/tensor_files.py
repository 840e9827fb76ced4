"""Tensors in files of the PyTorch world: `.safetensors`, and `.pt` as `torch.save` writes them.

A checkpoint holds up to four groups of tensors under the same names: `params`, `ema` and AdamW's moments `mu` and `nu`.
Tensors are read on demand and the file is opened anew for every read, so that no more of it stays in memory than what
was asked for. Only `.pt` needs PyTorch. No code in a file is ever run.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from sra_jax import values
from sra_jax.errors import UserError

GROUPS = ("params", "ema", "mu", "nu")
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "online_model.", "diffusion_model.")
"""What DistributedDataParallel, torch.compile and training frameworks put in front of names, in any order."""

EMA_WRAPPERS = ("ema_model.", "ema.", "model_ema.")
"""The same, in front of those of an EMA that lies beside the model."""

PLACES = {"params": ("model", "state_dict", "model_state_dict"), "ema": ("ema", "ema_model", "model_ema")}
"""Where training codes put a state dict."""

STEPS = ("steps", "step", "global_step", "train_steps")
"""What they call the number of updates."""

Shapes = dict[str, tuple[int, ...]]


class TensorFile(Protocol):
    """An opened checkpoint.

    Attributes:
      path: the file.
      shapes: name and shape of every tensor of the weights, names without wrappers, in the file's order.
      groups: those of `GROUPS` that the file holds; at least one of params and ema.
      arguments: the command line that the file was trained with, as far as it is saved there.
      step: updates made so far; 0 where the file does not tell.
      moment_step: AdamW's own count of updates, where the file holds `mu` and `nu`.
    """

    path: Path
    shapes: Shapes
    arguments: Mapping[str, Any]
    step: int
    moment_step: int

    @property
    def groups(self) -> tuple[str, ...]: ...

    def read(self, group: str, names: Sequence[str]) -> list[np.ndarray]:
        """Tensors of a group as float32 arrays of their own memory."""


def open_tensor_file(path: Path) -> TensorFile:
    """Open a checkpoint by its suffix: .safetensors, or .pt, .pth, .ckpt, .bin.

    Raises:
      UserError: no such file, another suffix, not a checkpoint, cut short, or a pickle that would run code.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a checkpoint, .pt or .safetensors")
    if path.suffix == ".safetensors":
        return Safetensors(path)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        return Torch(path)
    raise UserError(f"{path} has an unknown suffix {path.suffix!r}; allowed: .pt, .pth, .ckpt, .bin, .safetensors")


def _plain(name: str) -> tuple[str, str]:
    """(group, name without wrappers): `ema_model.module.pos_embed` is `pos_embed` of the EMA."""
    group = "params"
    while wrapper := next((w for w in (*WRAPPERS, *EMA_WRAPPERS) if name.startswith(w)), None):
        group = "ema" if wrapper in EMA_WRAPPERS else group
        name = name.removeprefix(wrapper)
    return group, name


def _grouped(path: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Group -> plain name -> name in the file.

    Raises:
      UserError: two names that differ in their wrappers only.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        group, plain = _plain(name)
        other = groups.setdefault(group, {}).setdefault(plain, name)
        if other != name:
            raise UserError(f"{path} holds {plain} twice, as {other} and as {name}: save the one that is meant alone")
    return groups


def _same_shapes(path: Path, shapes: Mapping[str, Shapes]) -> Shapes:
    """The shapes that all groups of a file share.

    Raises:
      UserError: two groups of different models.
    """
    first, *others = sorted(shapes, key=GROUPS.index)
    for group in others:
        if shapes[group] != shapes[first]:
            names = {**shapes[group], **shapes[first]}
            wrong = [name for name in names if shapes[group].get(name) != shapes[first].get(name)]
            raise UserError(f"{path}: its {first} and its {group} differ in {', '.join(wrong[:5])}")
    return shapes[first]


def _float32(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fV" and str(array.dtype) != "bfloat16":
        raise UserError(f"{path}: tensor {name} is {array.dtype}; weights are floating point numbers")
    return np.array(array, np.float32)


class Safetensors:
    """A bare state dict, or that of a model and its EMA under names that tell."""

    def __init__(self, path: Path):
        self.path = path
        self.arguments: Mapping[str, Any] = {}
        self.step = self.moment_step = 0
        try:
            with safe_open(path, "np") as file:
                self._names = _grouped(path, file.keys())
                shapes = {
                    group: {plain: tuple(file.get_slice(name).get_shape()) for plain, name in names.items()}
                    for group, names in self._names.items()
                }
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); fetch or convert it again") from error
        if not shapes:
            raise UserError(f"{path} holds no tensors")
        self.groups = tuple(group for group in GROUPS if group in shapes)
        self.shapes = _same_shapes(path, shapes)

    def read(self, group: str, names: Sequence[str]) -> list[np.ndarray]:
        """As in `TensorFile`."""
        with safe_open(self.path, "np") as file:
            return [_float32(self.path, name, file.get_tensor(self._names[group][name])) for name in names]


class Torch:
    """A bare state dict, or a dict with `model`, `ema`, `opt`, `args`, `steps` as training codes save them."""

    def __init__(self, path: Path):
        self.path = path
        content = self._load()
        if not isinstance(content, Mapping):
            raise UserError(f"{path} holds a {type(content).__name__}, not a state dict; it is not a checkpoint")
        self._tensors: dict[str, dict[str, tuple[Any, ...]]] = {}  # group -> plain name -> the way to the tensor
        if _is_state_dict(content):
            self._take((), content)
        else:
            for group, keys in PLACES.items():
                if key := next((key for key in keys if _is_state_dict(content.get(key))), None):
                    self._take((key,), content[key], group)
        if not self._tensors:
            raise UserError(
                f"{path} holds neither a state dict nor one under model or ema, but {_summary(content)}; it is not a "
                "checkpoint of a diffusion transformer"
            )
        self.shapes = _same_shapes(path, {
            group: {name: tuple(_walk(content, place).shape) for name, place in self._tensors[group].items()}
            for group in GROUPS if group in self._tensors
        })  # fmt: skip
        self.arguments = _arguments(content)
        self._index: dict[str, int] = {}
        self.moment_step = 0
        if "params" in self._tensors and isinstance(content.get("opt"), Mapping):
            self._find_moments(content["opt"])
        self.step = _step(content, self.moment_step)

    def _take(self, place: tuple[Any, ...], tensors: Mapping[str, Any], asked: str | None = None) -> None:
        """Note where the tensors of a state dict are; one that lies where an EMA belongs is one, whatever its names."""
        groups = _grouped(self.path, tensors)
        if asked == "ema":
            groups = {"ema": groups.get("ema") or groups["params"]}
        for group, names in groups.items():
            self._tensors.setdefault(group, {}).update({plain: (*place, name) for plain, name in names.items()})

    @property
    def groups(self) -> tuple[str, ...]:
        """Those of `GROUPS` that the file holds."""
        return tuple(group for group in GROUPS if group in self._tensors) + (("mu", "nu") if self._index else ())

    def read(self, group: str, names: Sequence[str]) -> list[np.ndarray]:
        """As in `TensorFile`."""
        content = self._load()
        if group in self._tensors:
            found = [_walk(content, self._tensors[group][name]) for name in names]
        else:
            moment = {"mu": "exp_avg", "nu": "exp_avg_sq"}[group]
            found = [content["opt"]["state"][self._index[name]][moment] for name in names]
        return [self._array(name, tensor) for name, tensor in zip(names, found, strict=True)]

    def _array(self, name: str, tensor: Any) -> np.ndarray:
        if not tensor.is_floating_point():
            raise UserError(f"{self.path}: tensor {name} is {tensor.dtype}; weights are floating point numbers")
        return np.array(tensor.detach().float().numpy())

    def _load(self) -> Any:
        """The file's content with its tensors mapped into memory, not read."""
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"reading {self.path} needs PyTorch (pip install torch); .safetensors files do not"
            ) from error
        # zip files, which torch has written since version 1.6, can be mapped; older ones are read whole
        mapped = zipfile.is_zipfile(self.path)
        try:
            # training codes save their arguments as a Namespace, which holds values and does nothing
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            refused = re.search(r"(?:GLOBAL|Unsupported (?:global|class)[^\w]*)\s*([\w.]+\.[\w.]+)", str(error))
            if refused and not refused[1].startswith("torch._utils"):  # those are tensors, cut short
                raise UserError(
                    f"{self.path} is a pickle that would run code or make objects ({refused[1]}), not tensors alone; "
                    "nothing of it was run. Save the state dict alone, or use a .safetensors file"
                ) from error
            raise UserError(
                f"{self.path} is not a whole PyTorch checkpoint: it is cut short, something else, or a pickle of more "
                "than tensors, of which nothing was run"
            ) from error
        except Exception as error:  # torch raises many kinds for files that are damaged or not its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0][:200]
            raise UserError(
                f"{self.path} is not a whole PyTorch checkpoint: it is cut short or something else ({reason})"
            ) from error

    def _find_moments(self, optimizer: Mapping[str, Any]) -> None:
        """Which entry of AdamW's state belongs to which parameter: torch numbers them in the model's order."""
        state, groups = optimizer.get("state"), optimizer.get("param_groups")
        if not isinstance(state, Mapping) or not state or not isinstance(groups, Sequence):
            return
        numbers = [number for group in groups for number in group["params"]]
        names = list(self.shapes)
        if len(numbers) == len(names) - 1:  # made of the trainable parameters alone
            names.remove("pos_embed")
        if len(numbers) != len(names):
            raise UserError(
                f"{self.path}: its optimizer has {len(numbers)} parameters and its model {len(names)}; "
                "--fresh_optimizer leaves the optimizer's state out"
            )
        for name, number in zip(names, numbers, strict=True):
            if number not in state:
                if name == "pos_embed":  # not trained
                    continue
                raise UserError(
                    f"{self.path}: its optimizer has no state of {name}; --fresh_optimizer leaves the optimizer's "
                    "state out"
                )
            for moment in ("exp_avg", "exp_avg_sq"):
                shape = tuple(state[number][moment].shape)
                if shape != self.shapes[name]:
                    raise UserError(
                        f"{self.path}: {moment} of {name} has shape {shape} instead of {self.shapes[name]}; "
                        "--fresh_optimizer leaves the optimizer's state out"
                    )
            self._index[name] = number
            self.moment_step = int(state[number]["step"])


def _is_state_dict(value: Any) -> bool:
    """Whether it maps names to tensors."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and hasattr(tensor, "is_floating_point") for name, tensor in value.items())
    )


def _walk(content: Any, place: Sequence[Any]) -> Any:
    for key in place:
        content = content[key]
    return content


def _arguments(content: Mapping[Any, Any]) -> Mapping[str, Any]:
    """The command line that is saved beside the weights, or nothing."""
    for key in ("args", "config", "hyper_parameters"):
        value = content.get(key)
        if isinstance(value, argparse.Namespace):
            return vars(value)
        if isinstance(value, Mapping) and not _is_state_dict(value):
            return value
    return {}


def _step(content: Mapping[Any, Any], otherwise: int) -> int:
    """The number of updates, which may be saved as a tensor."""
    for key in STEPS:
        value: Any = content.get(key)
        if getattr(value, "numel", lambda: 0)() == 1:
            value = value.item()
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= values.COUNT_LIMIT:
            return value
    return otherwise


def _summary(content: Mapping[Any, Any]) -> str:
    def parts() -> Iterator[str]:
        for key, value in list(content.items())[:5]:
            yield f"{key} ({type(value).__name__})"

    return ", ".join(parts()) or "nothing"
