"""A small autoencoder and small images; the conftest.py of each folder of tests that needs them imports them."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sra_jax.interop import autoencoder as vae_interop
from sra_jax.models.autoencoder import AutoencoderConfig, abstract_model


@dataclasses.dataclass(frozen=True)
class TinyVae:
    """A random autoencoder with SD's structure that encodes 16x16 pixels to 8x8x4 latents."""

    folder: Path
    config: AutoencoderConfig
    params: dict


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory) -> TinyVae:
    config = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5)
    _, shapes = abstract_model(config)
    rng = np.random.default_rng(0)

    def draw(abstract):
        fan_in = int(np.prod(abstract.shape[:-1])) if abstract.ndim > 1 else 100
        return rng.normal(0.0, fan_in**-0.5, abstract.shape).astype(np.float32) + (abstract.ndim == 1)

    params = jax.tree.map(draw, shapes)
    folder = tmp_path_factory.mktemp("vae")
    vae_interop.save(folder, config, params)
    return TinyVae(folder, config, params)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Two classes, `cat` and `dog`, with five small jpg, png and webp files in all."""
    rng = np.random.default_rng(1)
    sizes = {"dog/b.png": (20, 30), "dog/a.jpg": (33, 17), "cat/c.webp": (16, 16), "cat/deep/d.JPEG": (40, 64)}
    for name, size in {**sizes, "cat/e.jpg": (18, 21)}.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        smooth.save(path)
    return tmp_path / "images"
