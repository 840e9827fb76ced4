"""Small encoders of images and text, and small images; the conftest.py of each folder of tests that needs them imports
them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sra_jax.interop import autoencoder as vae_interop
from sra_jax.interop import clip_text
from sra_jax.models.autoencoder import AutoencoderConfig, abstract_model
from sra_jax.models.clip_text import ClipTextConfig


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


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A folder with a random text tower of 7 tokens a caption, width 12, and its tokenizer."""
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    vocabulary = clip_text.vocabulary_of(merges)
    config = ClipTextConfig(vocab_size=len(vocabulary), hidden_size=12, intermediate_size=16, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=7)  # fmt: skip
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), clip_text.abstract_params(config)[1]
    )
    folder = tmp_path_factory.mktemp("clip") / "tower"
    clip_text.save(folder, config, params, clip_text.make_tokenizer(vocabulary, merges))
    return folder


COCO_CAPTIONS = {
    7: ["a cat", "cat", "cat a cat"], 3: ["a dog"], 12: ["dog dog", "  ", None, "cat cat cat cat cat cat cat cat"],
    5: ["", 4], 9: ["a dog a cat", "a"],
}  # fmt: skip
"""Of each image id; among them empty ones, things that are no text, and one that is too long."""


@pytest.fixture
def coco_folder(tmp_path) -> Path:
    """COCO's layout with five images, in an order that is not that of their ids, and captions that cannot be used."""
    rng = np.random.default_rng(2)
    folder = tmp_path / "coco"
    (folder / "tiny2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images = [{"id": number, "file_name": f"COCO_{number:03d}.png"} for number in COCO_CAPTIONS]
    for image in images:
        pixels = rng.integers(0, 256, (5, 4, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((20, 26), Image.Resampling.BICUBIC)
        picture.save(folder / "tiny2014" / image["file_name"])
    annotations = [
        {"image_id": number, "id": 10 * number + i, "caption": caption}
        for number, captions in COCO_CAPTIONS.items() for i, caption in enumerate(captions)
    ]  # fmt: skip
    listing = folder / "annotations" / "captions_tiny2014.json"
    listing.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return folder
