"""Weights of the FID Inception network: published ones, converted once, or seeded random ones.

The published checkpoint is one file under two names: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` and
torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`. It is converted once: batch normalisation is folded into
the convolutions in float64, kernels go from (out, in, h, w) to (h, w, in, out), and the result is a safetensors file.
"""

import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from sra_jax import remote
from sra_jax.errors import UserError
from sra_jax.files import cache_folder
from sra_jax.interop.safetensors_tree import checksum, read_safetensors, write_safetensors
from sra_jax.interop.torch_file import read_torch_file
from sra_jax.models.inception import Inception

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"
CACHE_NAME = "inception-2015-12-05.safetensors"

BATCH_NORM_EPSILON = 1e-3
LOGIT_GAIN = 8

# Which 1x1 convolutions of the checkpoint make up `pointwise`, in the order in which the blocks split its output.
_A = ("branch1x1", "branch5x5_1", "branch3x3dbl_1", "branch_pool")
_C = ("branch1x1", "branch7x7_1", "branch7x7dbl_1", "branch_pool")
_E = ("branch1x1", "branch3x3_1", "branch3x3dbl_1")
POINTWISE = {
    "mixed_5b": _A,
    "mixed_5c": _A,
    "mixed_5d": _A,
    "mixed_6b": _C,
    "mixed_6c": _C,
    "mixed_6d": _C,
    "mixed_6e": _C,
    "mixed_7a": ("branch3x3_1", "branch7x7x3_1"),
    "mixed_7b": (*_E, "branch_pool"),
    "mixed_7c": _E,
}

Parameters = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class InceptionWeights:
    """Parameters of `sra_jax.models.inception.Inception` and where they come from.

    Attributes:
      parameters: nested dictionary of float32 arrays.
      checksum: 16 hexadecimal digits, a hash of names and values.
      published: whether they are those of the published checkpoint, which published FIDs were computed with.
    """

    parameters: Parameters
    checksum: str
    published: bool


def abstract_parameters() -> dict[str, Any]:
    """The network's parameter tree with `jax.ShapeDtypeStruct` leaves."""
    return nnx.to_pure_dict(nnx.split(nnx.eval_shape(Inception))[1])


def _tensor(state_dict: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in state_dict:
        raise UserError(f"no {name} among the {len(state_dict)} tensors: these are not weights of the FID Inception")
    return np.asarray(state_dict[name], np.float64)


def _fold(state_dict: Mapping[str, np.ndarray], module: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (h,w,in,out) and bias (out) of one convolution with its batch normalisation, float64."""
    kernel = _tensor(state_dict, f"{module}.conv.weight")
    weight, bias, mean, variance = (
        _tensor(state_dict, f"{module}.bn.{name}") for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(variance + BATCH_NORM_EPSILON)
    return kernel.transpose(2, 3, 1, 0) * scale, bias - mean * scale


def convert_state_dict(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Turns a checkpoint of torch-fidelity's or pytorch-fid's network into our parameters.

    Args:
      state_dict: names as in torch-fidelity, `Mixed_5b.branch1x1.conv.weight` and so on; the classifier's bias is not
        used.

    Returns:
      The parameter tree of `Inception`, float32.

    Raises:
      UserError: a tensor is missing or has another shape.
    """
    converted = {}
    for path, expected in flatten_dict(abstract_parameters()).items():
        *module, leaf = path
        if module == ["fc"]:
            values = _tensor(state_dict, "fc.weight").T
        else:
            block = module[0].capitalize()
            branches = POINTWISE[module[0]] if module[-1] == "pointwise" else module[1:]
            sources = [f"{block}.{branch}" for branch in branches] or [block]
            folded = [_fold(state_dict, source)[leaf == "bias"] for source in sources]
            values = np.concatenate(folded, axis=-1)
            if len(expected.shape) == 2:
                values = values[0, 0]
        if values.shape != expected.shape:
            raise UserError(
                f"{'.'.join(path)} would have the shape {values.shape}, the FID Inception has {expected.shape}: these "
                "are weights of another network"
            )
        converted[path] = values.astype(np.float32)
    return unflatten_dict(converted)


def random_parameters(seed: int = 0) -> dict[str, Any]:
    """Parameters of the true architecture, random but the same to the last bit on every machine and in every version.

    Kernels are uniform, centred over their inputs and scaled so that activations keep a standard deviation near one
    from layer to layer. Centring keeps the mean of rectified inputs from drowning their differences: features of
    different images stay different. Biases are uniform in [-0.1, 0.1). The last layer is scaled up by LOGIT_GAIN,
    without which the inception score would be 1 whatever the images.
    """
    bits = np.random.Philox(key=seed)
    parameters = {}
    for path, expected in sorted(flatten_dict(abstract_parameters()).items()):
        # Raw bits and sums of integers: neither depends on numpy's version or on the order of summation.
        size = int(np.prod(expected.shape))
        integers = (bits.random_raw(size) >> np.uint64(40)).astype(np.int64).reshape(expected.shape)  # [0, 2^24)
        if path[-1] == "bias":
            values = (integers - 2**23) / 2**23 * 0.1
        else:
            fan_in = int(np.prod(expected.shape[:-1]))
            centre = integers.sum(axis=tuple(range(integers.ndim - 1))) / fan_in
            # Uniform numbers in [-1, 1) have variance 1/3; rectifying a standard normal leaves 0.34 of its variance.
            scale = np.sqrt(3 / fan_in / 0.34) * (LOGIT_GAIN if path[0] == "fc" else 1)
            values = (integers - centre) / 2**23 * scale
        parameters[path] = values.astype(np.float32)
    return unflatten_dict(parameters)


def _read_converted(path: Path) -> InceptionWeights:
    parameters, metadata = read_safetensors(path)
    found, expected = flatten_dict(parameters), flatten_dict(abstract_parameters())
    if {name: (a.shape, a.dtype) for name, a in found.items()} != {n: (e.shape, e.dtype) for n, e in expected.items()}:
        raise UserError(
            f"{path} does not hold converted Inception weights. Give the published checkpoint {Path(URL).name} or the "
            f"{CACHE_NAME} that was made of it"
        )
    published = metadata.get("source_sha256", "").startswith(SHA256_PREFIX)
    return InceptionWeights(parameters, checksum(parameters), published)


def convert_checkpoint(source: Path, target: Path) -> InceptionWeights:
    """Reads the PyTorch checkpoint `source`, writes `target` (safetensors), returns the weights.

    Raises:
      UserError: `source` is missing, damaged or of another network.
    """
    try:
        parameters = convert_state_dict(read_torch_file(source))
    except UserError as error:
        raise UserError(f"Inception weights {source}: {error}") from error
    write_safetensors(target, parameters, {"source": source.name, "source_sha256": remote.file_sha256(source)})
    return _read_converted(target)


def _download(target: Path) -> None:
    advice = (
        f"Download {URL} with a browser or on another machine, then give it with --weights=path/to/{Path(URL).name}; "
        "or use --extractor=inception_random, whose numbers compare only with others of that extractor"
    )
    print(f"downloading {URL} (95 MB) to {target.parent}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".unfinished", delete=False) as unfinished:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                shutil.copyfileobj(response, unfinished)
            unfinished.seek(0)
            digest = hashlib.file_digest(unfinished, "sha256").hexdigest()
            if not digest.startswith(SHA256_PREFIX):
                raise OSError(f"what arrived has the SHA-256 {digest[:8]}..., expected {SHA256_PREFIX}...")
            os.replace(unfinished.name, target)
        except OSError as error:
            os.unlink(unfinished.name)
            raise UserError(f"Inception weights are not in {target.parent}, no download: {error}. {advice}") from error


def load_weights(path: str | Path | None = None) -> InceptionWeights:
    """Weights for FID: from a file, or the published ones from the cache, or from the network into the cache.

    Args:
      path: the published PyTorch checkpoint (`.pth`), or a `.safetensors` file that was converted from it. A checkpoint
        is converted once; the result is kept in the cache folder under its checksum. None takes the published one.

    Raises:
      UserError: the file is missing, damaged or of another network, or there is none and no way to download it.
    """
    if path is None:
        target = cache_folder() / CACHE_NAME
        if not target.exists():
            checkpoint = cache_folder() / Path(URL).name
            if not checkpoint.exists():
                _download(checkpoint)
            return convert_checkpoint(checkpoint, target)
        return _read_converted(target)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"Inception weights {path} do not exist. The published checkpoint is at {URL}")
    if path.suffix == ".safetensors":
        return _read_converted(path)
    digest = remote.file_sha256(path)
    target = cache_folder() / (
        CACHE_NAME if digest.startswith(SHA256_PREFIX) else f"inception-{digest[:16]}.safetensors"
    )
    return _read_converted(target) if target.exists() else convert_checkpoint(path, target)


def random_weights(seed: int = 0) -> InceptionWeights:
    """`random_parameters` with their checksum."""
    parameters = random_parameters(seed)
    return InceptionWeights(parameters, checksum(parameters), published=False)
