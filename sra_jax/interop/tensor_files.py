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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from sra_jax.errors import UserError

GROUPS = ("params", "ema", "mu", "nu")
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put in front of names."""

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


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _float32(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fV" and str(array.dtype) != "bfloat16":
        raise UserError(f"{path}: tensor {name} is {array.dtype}; weights are floating point numbers")
    return np.array(array, np.float32)


class Safetensors:
    """A bare state dict."""

    def __init__(self, path: Path):
        self.path = path
        self.groups: tuple[str, ...] = ("params",)
        self.arguments: Mapping[str, Any] = {}
        self.step = self.moment_step = 0
        try:
            with safe_open(path, "np") as file:
                self._names = {_plain(name): name for name in file.keys()}  # noqa: SIM118 (not a dict)
                self.shapes: Shapes = {
                    plain: tuple(file.get_slice(name).get_shape()) for plain, name in self._names.items()
                }
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); fetch or convert it again") from error

    def read(self, group: str, names: Sequence[str]) -> list[np.ndarray]:
        """As in `TensorFile`."""
        with safe_open(self.path, "np") as file:
            return [_float32(self.path, name, file.get_tensor(self._names[name])) for name in names]


class Torch:
    """A bare state dict, or a dict with `model`, `ema`, `opt`, `args`, `steps` as training codes save them."""

    def __init__(self, path: Path):
        self.path = path
        content = self._load()
        if not isinstance(content, Mapping):
            raise UserError(f"{path} holds a {type(content).__name__}, not a state dict; it is not a checkpoint")
        self._paths: dict[str, tuple[Any, ...]] = {}
        if _is_state_dict(content):
            self._paths["params"] = ()
        else:
            for group, keys in (("params", ("model", "state_dict")), ("ema", ("ema",))):
                for key in keys:
                    if _is_state_dict(content.get(key)):
                        self._paths[group] = (key,)
                        break
        if not self._paths:
            raise UserError(
                f"{path} holds neither a state dict nor one under model or ema, but {_summary(content)}; it is not a "
                "checkpoint of a diffusion transformer"
            )
        weights = _walk(content, next(iter(self._paths.values())))
        self._names = {_plain(name): name for name in weights}
        self.shapes: Shapes = {plain: tuple(weights[name].shape) for plain, name in self._names.items()}
        for group, place in self._paths.items():
            other = {_plain(name): tuple(tensor.shape) for name, tensor in _walk(content, place).items()}
            if other != self.shapes:
                names = [n for n in {**other, **self.shapes} if other.get(n) != self.shapes.get(n)]
                raise UserError(f"{path}: its model and its {group} differ in {', '.join(names[:5])}")
        self.arguments = _arguments(content.get("args"))
        self._index: dict[str, int] = {}
        self.moment_step = 0
        if "params" in self._paths and isinstance(content.get("opt"), Mapping):
            self._find_moments(content["opt"])
        steps = content.get("steps", content.get("step"))
        self.step = steps if isinstance(steps, int) else self.moment_step

    @property
    def groups(self) -> tuple[str, ...]:
        """Those of `GROUPS` that the file holds."""
        return tuple(self._paths) + (("mu", "nu") if self._index else ())

    def read(self, group: str, names: Sequence[str]) -> list[np.ndarray]:
        """As in `TensorFile`."""
        content = self._load()
        if group in self._paths:
            tensors = _walk(content, self._paths[group])
            keys = {_plain(name): name for name in tensors}
            found = [tensors[keys[name]] for name in names]
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


def _arguments(value: Any) -> Mapping[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, Mapping) else {}


def _summary(content: Mapping[Any, Any]) -> str:
    def parts() -> Iterator[str]:
        for key, value in list(content.items())[:5]:
            yield f"{key} ({type(value).__name__})"

    return ", ".join(parts()) or "nothing"
