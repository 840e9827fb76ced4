"""Training on latents that tools/prepare_latents.py made (`config.data.name = "latents"`).

Every step samples the posterior anew, on the device: x0 = ((mean + std * noise) - shift) * scale.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sra_jax.data import caption_shards, record_files, shards
from sra_jax.data.captions import TextEncoder
from sra_jax.data.dataset import Dataset, Decoder, Example
from sra_jax.data.images import centre_crop, to_array
from sra_jax.errors import UserError
from sra_jax.interop import autoencoder as vae_interop
from sra_jax.interop import clip_text
from sra_jax.models.autoencoder import Autoencoder, AutoencoderConfig

STABLE_DIFFUSION = (4, 0.18215)
"""Channels and scaling factor of the latents of Stable Diffusion's first autoencoders, sd-vae-ft-ema among them."""


class LatentSource:
    """Random access to the examples of a folder of latents; picklable, files are opened when they are first read.

    An example is `mean` and `std` (H,W,C) in the manifest's dtype and `label` () int32. Threads may share a source.
    """

    def __init__(self, folder: str, manifest: shards.Manifest):
        filled = [shard for shard in manifest.shards if shard.examples]
        self._layout = manifest.layout
        self._num_classes = manifest.num_classes
        self._ends = np.cumsum([shard.examples for shard in filled])
        self._starts = self._ends - [shard.examples for shard in filled]
        paths = [str(Path(folder).expanduser() / shard.file) for shard in filled]
        self._files = record_files.OpenFiles(paths, [shard.examples for shard in filled], manifest.layout.record_bytes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One example, its stored hash checked; a UserError names the shard of a record that cannot be read."""
        (shard,), (record,) = self._locate(np.array([index]))
        try:
            example = self._layout.from_bytes(self._files[int(shard)].read(int(record)))
        except record_files.UnreadableFileError as error:
            raise _unreadable(error) from error
        self._check_labels([index], example["label"])
        return example

    def where(self, index: int) -> str:
        """The place of an example: its shard, its record there and its number in the set."""
        (shard,), (record,) = self._locate(np.array([index]))
        return f"{self._files.paths[shard]}, record {record} (example {index})"

    def read_batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices` (B,), stacked: `mean` and `std` (B,H,W,C), `label` (B,) int32.

        Much faster than one by one: each record is copied once, to its place in arrays that belong to the caller.
        Hashes are not checked here: run tools/prepare_latents.py --verify after a folder was moved.

        Raises:
          UserError: names the shard of a record that cannot be read, or whose label is no class of the set.
        """
        shard, records = self._locate(np.asarray(indices))
        parts = self._layout.empty_parts(len(shard))
        try:
            self._files.read(shard, records, parts)
        except record_files.UnreadableFileError as error:
            raise _unreadable(error) from error
        batch = self._layout.from_parts(*parts)
        self._check_labels(indices, batch["label"])
        return batch

    def _check_labels(self, indices: Sequence[int] | np.ndarray, labels: np.ndarray) -> None:
        wrong = (labels < 0) | (labels >= self._num_classes)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"{self.where(int(indices[first]))} has the label {np.ravel(labels)[first]}, classes run from 0 to "
                f"{self._num_classes - 1}: find out with tools/prepare_latents.py --verify which shards are damaged"
            )

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard and the record in it of each index."""
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"indices from {indices.min()} to {indices.max()} of a set with {len(self)} examples")
        shard = np.searchsorted(self._ends, indices, side="right")
        return shard, indices - self._starts[shard]


def _unreadable(error: record_files.UnreadableFileError) -> UserError:
    if isinstance(error, record_files.TooManyOpenFilesError):
        return UserError(str(error))
    return UserError(f"{error}: find out with tools/prepare_latents.py --verify which shards are damaged")


def sample_posterior(
    batch: Mapping[str, jax.Array], key: Any, scaling_factor: float, shift_factor: float = 0.0
) -> jax.Array:
    """Scaled latents drawn from the posterior of each example.

    Args:
      batch: `mean` and `std`, each (B,H,W,C) float32, float16 or bfloat16.
      key: a JAX random key; the noise of all B examples is one draw, so that it depends on an example's place in the
        batch and not on the devices.
      scaling_factor: the autoencoder's.
      shift_factor: the autoencoder's.

    Returns:
      (B,H,W,C) float32.
    """
    mean = batch["mean"].astype(jnp.float32)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    return (mean + batch["std"].astype(jnp.float32) * noise - shift_factor) * scaling_factor


def _manifest(data: Any) -> shards.Manifest:
    if not data.path:
        raise UserError(
            "data.path is empty: latents come from a folder that tools/prepare_latents.py makes of images, such as\n"
            "  python tools/prepare_latents.py --source=tfds:imagenet2012 --output=LATENTS --image_size=256\n"
            "then add --config.data.path=LATENTS. Without images: the :smoke variant of the recipe, or "
            "--config.data.name=synthetic"
        )
    return shards.read_manifest(data.path)


def load(data: Any) -> Dataset:
    """The training set in the folder `data.path`.

    Args:
      data: the config's data part: `path`, `image_size` (the latents' side), `channels`, `num_classes`.

    Raises:
      UserError: the folder is missing, unfinished or damaged, or holds other latents than the config describes.
    """
    manifest = _manifest(data)
    height, width, channels = manifest.layout.shape
    if (height, width) != (data.image_size, data.image_size):
        raise UserError(f"data.image_size={data.image_size}, but the latents in {data.path} are {height}x{width}")
    if channels != data.channels:
        raise UserError(f"data.channels={data.channels}, but the latents in {data.path} have {channels}")
    captioned = "context_width" in data
    # a set without class names only shows the labels that occur in it, so there may be more classes
    fits = data.num_classes == manifest.num_classes or (
        manifest.class_names is None and data.num_classes > manifest.num_classes
    )
    if not fits and not captioned:
        raise UserError(
            f"data.num_classes={data.num_classes}, but the latents in {data.path} have {manifest.num_classes} classes"
        )
    if not manifest.examples:
        raise UserError(f"{data.path} holds no example: every image of {manifest.source} was unreadable")
    folder = shards.local_folder(data.path, manifest.shards, data.get("cache", ""))
    shards.check_sizes(folder, manifest)
    scale, shift = manifest.vae_config.scaling_factor, manifest.vae_config.shift_factor
    source: LatentSource | caption_shards.WithCaptions = LatentSource(str(folder), manifest)
    null = text = None
    if captioned:
        stored = _captions(data)
        shards.local_folder(data.path, stored.shards, data.get("cache", ""))  # beside the latents
        source = caption_shards.WithCaptions(source, str(folder), stored)
        null = caption_shards.read_null(data.path)
        text = text_encoder(data) if stored.form == "ids" else None
    return Dataset(
        source=source,
        latent_shape=manifest.layout.shape,
        num_classes=data.num_classes,
        encode=lambda batch, key: sample_posterior(batch, key, scale, shift),
        class_names=manifest.class_names,
        stable_diffusion=(channels, scale) == STABLE_DIFFUSION,
        null=null,
        text=text,
    )


def _captions(data: Any) -> caption_shards.Stored:
    """What the folder says of its captions.

    Raises:
      UserError: it has none, or in another form than `data.captions` says.
    """
    stored = caption_shards.read(data.path)
    if stored is None:
        raise UserError(
            f"{data.path} holds latents without captions, and the model is told captions (model.name=mmdit): prepare "
            "images with captions, such as tools/prepare_latents.py --source=coco:DIR, or take a recipe with labels"
        )
    if stored.form != data.captions:
        raise UserError(
            f"data.captions={data.captions!r}, but {data.path} stores {stored.form}: set data.captions={stored.form!r} "
            f"or delete {caption_shards.FILE} there and run tools/prepare_latents.py with --captions={data.captions}"
        )
    return stored


def text_encoder(data: Any) -> TextEncoder:
    """The text encoder that embedded the set's captions.

    Args:
      data: the config's data part: `path`, whose captions name the encoder, and `text_encoder`, a folder or a Hugging
        Face id that takes its place where it is not empty.

    Raises:
      UserError: it cannot be found, or has other weights than the one that embedded the captions.
    """
    _manifest(data)  # raises
    stored = _captions(data)
    tower = clip_text.load(data.text_encoder or stored.encoder, stored.length)
    if tower.fingerprint != stored.encoder_sha256:
        raise UserError(
            f"the text encoder {tower.name} has other weights than the one that embedded the captions in {data.path} "
            f"({stored.encoder}): set data.text_encoder to that one"
        )
    return TextEncoder(tower.config, tower.params, tower.tokenizer, caption_shards.read_null(data.path))


def decoder(data: Any) -> Decoder:
    """Scaled latents (B,h,w,C) to images (B,H,W,3) uint8, through the autoencoder that made the latents.

    Args:
      data: the config's data part: `path`, whose manifest names the autoencoder, and `vae`, a folder or a Hugging Face
        id that takes its place where it is not empty. `path` may be empty where `vae` is given.

    Raises:
      UserError: the autoencoder cannot be found, or its scaling or latents differ from those in the manifest.
    """
    return _vae(data)


def example_from_image(data: Any, picture: Image.Image) -> Example:
    """The posterior of any picture, cropped as ADM does and encoded by the set's autoencoder; its label is 0, its
    caption the empty one."""
    vae = _vae(data)
    pixels = to_array(centre_crop(picture.convert("RGB"), data.image_size * vae.config.downsampling), 3)
    mean, std = vae.encode(jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1)
    told = caption_shards.read_null(data.path) if "context_width" in data else {"label": np.zeros((), np.int32)}
    return {"mean": np.asarray(mean[0]), "std": np.asarray(std[0]), **told}


def _vae(data: Any) -> Autoencoder:
    """The autoencoder of the set; see `decoder`."""
    manifest = _manifest(data) if data.path else None
    if not data.vae and manifest is None:
        raise UserError("neither data.vae nor data.path is given: one of them must say which VAE decodes the latents")
    vae = vae_interop.load(data.vae or (manifest.vae_name if manifest else ""))
    if manifest is not None:
        for field in ("latent_channels", "scaling_factor", "shift_factor"):
            _check_same(field, vae.config, manifest.vae_config, vae.name, data.path)
    if vae.config.latent_channels != data.channels:
        raise UserError(
            f"data.channels={data.channels}, but the VAE {vae.name} decodes latents with {vae.config.latent_channels}"
        )
    return vae


def _check_same(field: str, ours: AutoencoderConfig, prepared: AutoencoderConfig, name: str, path: str) -> None:
    if getattr(ours, field) != getattr(prepared, field):
        raise UserError(
            f"the VAE {name} has {field}={getattr(ours, field)}, but the latents in {path} were made with "
            f"{field}={getattr(prepared, field)}: set data.vae to the VAE that made them"
        )
