"""Images through the autoencoder into shards of latents: the work of tools/prepare_latents.py."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sra_jax.data import shards
from sra_jax.data.image_sources import ImageItem, ImageSource
from sra_jax.data.images import CROPS, UnreadableImageError, read_image, to_array
from sra_jax.data.moments import MomentsFolder, MomentsItem
from sra_jax.errors import RunError, UserError
from sra_jax.models.autoencoder import Autoencoder, AutoencoderConfig

Item = TypeVar("Item", ImageItem, MomentsItem)

# Batches whose images are read while the device encodes an earlier one
_BATCHES_AHEAD = 3


class MomentsMaker(Protocol):
    """Turns what a source gives into moments."""

    settings: dict[str, Any]
    latent_shape: tuple[int, int, int]

    def load(self, item: Any) -> np.ndarray:
        """One example's array, read in a thread; raises UnreadableImageError."""

    def moments(self, batch: list[np.ndarray]) -> Callable[[], np.ndarray]:
        """Start the work on a batch of n loaded arrays; the result waits for it: (n,copies,2,H,W,C) float32."""


class ImageEncoder:
    """Crops images and encodes them on all devices of this process, each a part of every batch."""

    def __init__(
        self, autoencoder: Autoencoder, image_size: int, batch_size: int, flip: bool, crop: str = "adm"
    ):
        """Args:
          autoencoder: its weights are copied to every device.
          image_size: side of the crops in pixels, a multiple of the autoencoder's downsampling.
          batch_size: images that are encoded together, over all devices.
          flip: also encode each image flipped left to right.
          crop: of images, one of `CROPS`.

        Raises:
          UserError: sizes that do not divide.
        """
        config, devices = autoencoder.config, jax.local_devices()
        if config.in_channels != 3:
            raise UserError(f"the VAE {autoencoder.name} takes {config.in_channels} channels, images have 3")
        if image_size < 1 or image_size % config.downsampling:
            raise UserError(f"--image_size={image_size} must be a multiple of the VAE's factor {config.downsampling}")
        if batch_size < 1 or batch_size % len(devices):
            raise UserError(f"--batch_size={batch_size} must be a multiple of the {len(devices)} devices here")
        side = image_size // config.downsampling
        self.latent_shape = (side, side, config.latent_channels)
        self.settings = {"image_size": image_size, "flip": flip, "compute_dtype": str(autoencoder.dtype)}
        if crop != "adm":  # folders that were begun before there was a choice say nothing of it
            self.settings["crop"] = crop
        self._crop = CROPS[crop]
        self._autoencoder = autoencoder
        self._image_size = image_size
        self._batch_size = batch_size
        self._flip = flip
        self._sharding = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
        self._to_unit_range = jax.jit(lambda images: images.astype(jnp.float32) / 127.5 - 1.0)

    def load(self, item: ImageItem) -> np.ndarray:
        """(image_size,image_size,3) uint8."""
        return to_array(self._crop(read_image(item.content), self._image_size), 3)

    def _encode(self, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
        on_devices = jax.device_put(images, self._sharding)
        return self._autoencoder.encode(self._to_unit_range(on_devices))

    def moments(self, batch: list[np.ndarray]) -> Callable[[], np.ndarray]:
        # one shape for every batch: a shorter last one is filled up rather than compiled anew
        images = np.zeros((self._batch_size, *batch[0].shape), np.uint8)
        images[: len(batch)] = batch
        encoded = [self._encode(images)]
        if self._flip:
            encoded.append(self._encode(images[:, :, ::-1]))

        def result() -> np.ndarray:
            copies = [np.stack([np.asarray(mean), np.asarray(std)], axis=1) for mean, std in encoded]
            return np.stack(copies, axis=1)[: len(batch)]

        return result


class MomentsCopier:
    """Takes moments that were encoded already."""

    def __init__(self, source: MomentsFolder, config: AutoencoderConfig):
        """Raises a UserError if the moments are not of an autoencoder of this config."""
        self.latent_shape = source.shape[1:]
        if self.latent_shape[-1] != config.latent_channels:
            raise UserError(
                f"the moments have {self.latent_shape[-1]} latent channels, --vae has {config.latent_channels}"
            )
        self.settings = {"image_size": self.latent_shape[0] * config.downsampling, "flip": False, "compute_dtype": None}

    def load(self, item: MomentsItem) -> np.ndarray:
        """(2,H,W,C) float32."""
        moments = item.read()
        if moments.shape[1:] != self.latent_shape:
            raise UnreadableImageError(f"its moments have shape {moments.shape[1:]}, the first {self.latent_shape}")
        return moments

    def moments(self, batch: list[np.ndarray]) -> Callable[[], np.ndarray]:
        stacked = np.stack(batch)[:, None]
        return lambda: stacked


def load_ahead(
    items: Iterable[Item], load: Callable[[Item], np.ndarray], executor: Executor, ahead: int
) -> Iterator[tuple[Item, np.ndarray | UnreadableImageError]]:
    """Each item with what `load` gives or raises for it, in order; up to `ahead` items are loaded in advance."""

    def attempt(item: Item) -> tuple[Item, np.ndarray | UnreadableImageError]:
        try:
            return item, load(item)
        except UnreadableImageError as error:
            return item, error

    waiting: collections.deque[Future[tuple[Item, np.ndarray | UnreadableImageError]]] = collections.deque()
    for item in items:
        waiting.append(executor.submit(attempt, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclasses.dataclass
class Report:
    """What one process did.

    Attributes:
      examples: images read in this run, without those of shards that were there before.
      skipped: [name, reason] of unreadable images in all shards that are this process's, old and new.
      complete: whether every shard of the set is there, so that the manifest is written.
    """

    examples: int
    skipped: list[tuple[str, str]]
    complete: bool


def prepare(
    source: ImageSource | MomentsFolder,
    maker: MomentsMaker,
    output: str,
    *,
    source_name: str,
    vae_name: str,
    vae_fingerprint: str | None,
    vae_config: AutoencoderConfig,
    dtype: str,
    batch_size: int,
    shard_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 8,
    progress: Callable[[int, int], None] = lambda images, images_left: None,
    on_skip: Callable[[str, str], None] = lambda name, reason: None,
) -> Report:
    """Make this process's shards of a folder of latents, and the manifest when it finds all shards done.

    Shard i holds the images i*shard_size to (i+1)*shard_size-1 of the source, without those that cannot be read, each
    followed by its flipped copy if there is one. Process p of n makes the shards i with i % n == p.

    Args:
      source: the images.
      maker: what turns them into moments.
      output: the folder.
      source_name: how the user named the source.
      vae_name: how the user named the autoencoder.
      vae_fingerprint: SHA-256 of its weights, None if they were not read.
      vae_config: its sizes and scaling.
      dtype: of moments on disk, one of shards.DTYPES.
      batch_size: images that `maker` gets at once.
      shard_size: images of the source a shard.
      process_index: which process this is.
      process_count: how many there are.
      workers: threads that read images.
      progress: told after each batch, and once at the start: images done, images of this process in all.
      on_skip: told of each unreadable image: its name and the reason.

    Raises:
      UserError: see `shards.ShardWriter`.
      RunError: no image at all could be used.
    """
    if shard_size < 1:
        raise UserError(f"--shard_size={shard_size} must be at least 1")
    if not 0 <= process_index < process_count:
        raise UserError(f"--process_index={process_index} must be from 0 to --process_count={process_count} minus 1")
    layout = shards.RecordLayout(maker.latent_shape, dtype)
    settings = {
        "source_fingerprint": source.fingerprint(),
        "source_images": len(source),
        **maker.settings,
        "dtype": dtype,
        "shard_size": shard_size,
        "vae_sha256": vae_fingerprint,
        "vae_scaling_factor": vae_config.scaling_factor,
    }
    count = -(-len(source) // shard_size)
    writer = shards.ShardWriter(output, settings, layout, count)
    own = range(process_index, count, process_count)
    ranges = {i: (i * shard_size, min((i + 1) * shard_size, len(source))) for i in own}
    total = sum(stop - start for start, stop in ranges.values())
    report, finished = Report(0, [], False), 0
    with writer.claimed(process_index, process_count), ThreadPoolExecutor(workers) as executor:
        for index, (start, stop) in ranges.items():
            done = writer.done(index)
            if done is None:
                skipped: list[tuple[str, str]] = []

                def tell(images: int, before: int = finished) -> None:
                    progress(before + images, total)

                tell(0)
                items: Iterator[Any] = source.items(start, stop)  # those that the maker loads
                loaded = load_ahead(items, maker.load, executor, _BATCHES_AHEAD * batch_size)
                made = _moments(loaded, maker, batch_size, layout.numpy_dtype, skipped, on_skip, tell)
                writer.write(index, made, skipped)
                report.examples += stop - start - len(skipped)
            else:
                skipped = done[1]
            report.skipped += skipped
            finished += stop - start
            progress(finished, total)
        if process_count == 1 and len(report.skipped) == len(source):
            name, reason = report.skipped[0]
            raise RunError(f"none of {len(source)} images could be used; the first, {name}: {reason}")
        report.complete = writer.finish(
            lambda made, all_skipped: shards.Manifest(
                settings=settings,
                source=source_name,
                layout=layout,
                num_classes=source.num_classes,
                class_names=source.class_names,
                vae_name=vae_name,
                vae_fingerprint=vae_fingerprint,
                vae_config=vae_config,
                shards=made,
                skipped=all_skipped,
            )
        )
    return report


def _moments(
    loaded: Iterable[tuple[Any, np.ndarray | UnreadableImageError]],
    maker: MomentsMaker,
    batch_size: int,
    dtype: np.dtype,
    skipped: list[tuple[str, str]],
    on_skip: Callable[[str, str], None],
    tell: Callable[[int], None],
) -> Iterator[tuple[np.ndarray, int]]:
    """Moments (2,H,W,C) in `dtype` and label of each copy of each usable image, in order."""
    unreadable = 0

    def skip(item: Any, reason: str) -> None:
        skipped.append((item.where, reason))
        on_skip(item.where, reason)

    def readable() -> Iterator[tuple[Any, np.ndarray]]:
        nonlocal unreadable
        for item, array in loaded:
            if isinstance(array, UnreadableImageError):
                unreadable += 1
                skip(item, str(array))
            else:
                yield item, array

    def finished(result: Callable[[], np.ndarray], items: list[Any]) -> Iterator[tuple[np.ndarray, int]]:
        for item, copies in zip(items, result(), strict=True):
            with np.errstate(over="ignore"):
                stored = copies.astype(dtype)
            if np.isfinite(stored).all():
                for moments in stored:
                    yield moments, item.label
            elif np.isfinite(copies).all():
                skip(item, f"its latents are beyond the range of {dtype}: choose another --dtype")
            else:
                skip(item, "its latents hold NaN or infinite values")

    done = 0
    pending: tuple[Callable[[], np.ndarray], list[Any]] | None = None
    arrays = readable()
    while batch := list(itertools.islice(arrays, batch_size)):
        started = maker.moments([array for _, array in batch]), [item for item, _ in batch]
        # the device works on this batch while the one before it is written and the next is read
        if pending is not None:
            yield from finished(*pending)
        pending = started
        done += len(batch)
        tell(done + unreadable)
    if pending is not None:
        yield from finished(*pending)
