"""Weights of diffusers' AutoencoderKL, read from safetensors without PyTorch.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`, as diffusers writes them. Both generations of
names are understood for the attention's weights: `to_q`, `to_k`, `to_v`, `to_out.0` and the older `query`, `key`,
`value`, `proj_attn` (then often stored as 1x1 convolutions).
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sra_jax import files, remote
from sra_jax.errors import UserError
from sra_jax.interop import hub
from sra_jax.models.autoencoder import Autoencoder, AutoencoderConfig, abstract_model

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_KIND = hub.Kind("VAE", "vae", f"{CONFIG_FILE} and {WEIGHTS_FILE} of a diffusers VAE", DEFAULT_VAE)

# Repositories whose config.json is AutoencoderConfig's defaults: their sizes are known without a network
_SD1_REPOSITORIES = (DEFAULT_VAE, "stabilityai/sd-vae-ft-mse")

# One part of the path in our tree -> the same part of a diffusers name; parts that are not here are the same in both
_PART_NAMES = {
    "down": "down_blocks",
    "up": "up_blocks",
    "mid": "mid_block",
    "downsample": "downsamplers.0.conv",
    "upsample": "upsamplers.0.conv",
    "attention": "attentions.0",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "norm_out": "conv_norm_out",
    "kernel": "weight",
    "scale": "weight",
}
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def tensor_name(path: tuple[Any, ...]) -> str:
    """The diffusers name of a parameter, e.g. ("encoder", "down", 0, "downsample", "kernel") ->
    "encoder.down_blocks.0.downsamplers.0.conv.weight"."""
    return ".".join(_PART_NAMES.get(part, str(part)) for part in path)


def modern_name(name: str) -> str:
    """A tensor's name with the attention's older names replaced by today's."""
    return re.sub(
        r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda m: _OLD_ATTENTION_NAMES[m.group()], name
    )


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    """Kernels (H,W,I,O) -> (O,I,H,W) and (I,O) -> (O,I); vectors as they are."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def params_from_tensors(tensors: Mapping[str, np.ndarray], config: AutoencoderConfig, where: str) -> dict[str, Any]:
    """The parameter tree of `config` from tensors under diffusers names.

    Args:
      tensors: name -> array in PyTorch's layout, any floating type.
      config: the sizes.
      where: what the tensors were read from, for messages.

    Returns:
      A nested dict as `nnx.to_pure_dict` gives, float32.

    Raises:
      UserError: a tensor is missing, unknown or of another shape; all such tensors are named.
    """
    given = {modern_name(name): array for name, array in tensors.items()}
    _, shapes = abstract_model(config)
    params, problems = {}, []
    for path, abstract in traverse_util.flatten_dict(shapes).items():
        name = tensor_name(path)
        array = given.pop(name, None)
        if array is None:
            problems.append(f"missing {name}")
            continue
        if array.ndim == 4 and len(abstract.shape) == 2 and array.shape[2:] == (1, 1):
            array = array[:, :, 0, 0]
        if _from_torch_layout(array).shape != abstract.shape:
            wanted = _to_torch_layout(np.empty(abstract.shape, np.bool_)).shape
            problems.append(f"{name} has shape {array.shape}, config.json asks for {wanted}")
            continue
        params[path] = np.ascontiguousarray(_from_torch_layout(array), np.float32)
    problems += [f"unknown {name}" for name in given]
    if problems:
        listed = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise UserError(
            f"the weights in {where} do not fit its {CONFIG_FILE}:\n  {listed}\nTake both files from one repository."
        )
    return traverse_util.unflatten_dict(params)


def tensors_from_params(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `params_from_tensors`, under diffusers' present names."""
    return {
        tensor_name(path): np.ascontiguousarray(_to_torch_layout(np.asarray(array)))
        for path, array in traverse_util.flatten_dict(params).items()
    }


def config_from_json(text: str, where: str) -> AutoencoderConfig:
    """The sizes that a `config.json` describes.

    Raises:
      UserError: it is not an AutoencoderKL's, or has something that this implementation does not.
    """
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(given, dict) or "block_out_channels" not in given:
        raise UserError(f"{where} is not the config.json of a diffusers AutoencoderKL: it has no block_out_channels")
    stages = len(given["block_out_channels"])
    only = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "latents_mean": None,
        "latents_std": None,
    }
    for key, allowed in only.items():
        if given.get(key, allowed) != allowed:
            raise UserError(f"{where}: {key}={given[key]!r} is not supported, only {allowed!r}")
    known = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    values = {key: value for key, value in given.items() if key in known and value is not None}
    config = AutoencoderConfig(**{**values, "block_out_channels": tuple(given["block_out_channels"])})
    if any(width % config.norm_num_groups for width in config.block_out_channels):
        raise UserError(
            f"{where}: norm_num_groups={config.norm_num_groups} does not divide every one of "
            f"block_out_channels={list(config.block_out_channels)}"
        )
    if not config.scaling_factor > 0:
        raise UserError(f"{where}: scaling_factor={config.scaling_factor} must be above 0")
    return config


def config_to_json(config: AutoencoderConfig) -> str:
    """The `config.json` that diffusers would write for these sizes."""
    stages = len(config.block_out_channels)
    values = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        **dataclasses.asdict(config),
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def read_config(vae: str) -> AutoencoderConfig:
    """The sizes and the scaling of a VAE, without its weights.

    Args:
      vae: a folder, or a Hugging Face id, whose config.json is fetched if need be.

    Raises:
      UserError: see `load`.
    """
    if vae in _SD1_REPOSITORIES and not os.path.isdir(vae):
        return AutoencoderConfig()
    path = hub.find(vae, CONFIG_FILE, _KIND)
    return config_from_json(path.read_text(), str(path))


def load(vae: str = DEFAULT_VAE, dtype: Any = jnp.float32) -> Autoencoder:
    """An autoencoder with its weights.

    Args:
      vae: a folder with config.json and diffusion_pytorch_model.safetensors, or a Hugging Face id `owner/name`
        (`owner/name/folder` for a folder inside a repository), fetched once into a cache in
        `$XDG_CACHE_HOME/sra_jax` (by default ~/.cache/sra_jax).
      dtype: type of convolutions and matrix products.

    Raises:
      UserError: files are missing and cannot be fetched, or do not fit each other.
    """
    config_path, weights_path = (hub.find(vae, name, _KIND) for name in (CONFIG_FILE, WEIGHTS_FILE))
    config = config_from_json(config_path.read_text(), str(config_path))
    params = params_from_tensors(hub.read_safetensors(weights_path), config, str(weights_path))
    return Autoencoder(config, params, dtype=dtype, name=vae, fingerprint=remote.file_sha256(weights_path))


def save(folder: str | os.PathLike, config: AutoencoderConfig, params: Mapping[str, Any]) -> None:
    """Write a folder that `load` and diffusers read.

    Raises:
      UserError: the folder already holds a VAE.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(folder / WEIGHTS_FILE, tensors_from_params(params), {"format": "pt"})
    files.write_text(folder / CONFIG_FILE, config_to_json(config))
