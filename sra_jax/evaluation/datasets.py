"""Training sets as images to compare with: what `--reference=digits` or `--reference=idx:FOLDER` means."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.data import image_sources, registry
from sra_jax.data.images import UnreadableImageError, centre_crop, read_image, to_array
from sra_jax.data.preparation import load_ahead
from sra_jax.errors import UserError
from sra_jax.evaluation.images import ImageSet

PREFIXES = ("idx:", "imagefolder:", "tfds:", "sklearn:")
OWN = "dataset"


def is_dataset(name: str) -> bool:
    """Whether a reference is named as a dataset rather than as a file or folder."""
    return name in (OWN, "digits") or name.startswith(PREFIXES)


def named_images(
    name: str, image_size: int, channels: int, *, labelled: bool = True, data_dir: str | None = None
) -> ImageSet:
    """The images of a dataset, at the size and in the colours of the samples.

    Args:
      name: digits, or a source as tools/prepare_latents.py names it, such as idx:FOLDER.
      image_size: height and width, pixels.
      channels: 1 or 3.
      labelled: whether labels are needed; a set of TFDS is read once only for these.
      data_dir: for tfds, the folder of its sets; None takes TFDS's own.

    Raises:
      UserError: there is no such set, or it does not come in this size.
    """
    if name == "digits":
        if (image_size, channels) != (8, 1):
            raise UserError(f"the digits are 8x8 grey images, the samples {image_size}x{image_size} with {channels}")
        data = config_lib.default().data
        data.update(name="digits", image_size=8, channels=1, num_classes=10)
        return dataset_images(data)
    source = image_sources.open_images(name, data_dir)

    def load(item: image_sources.ImageItem) -> np.ndarray:
        return to_array(centre_crop(read_image(item.content), image_size), channels)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        batch = []
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            for item, image in load_ahead(source.items(0, len(source)), load, executor, 2 * batch_size):
                if isinstance(image, UnreadableImageError):
                    raise UserError(f"{item.where} cannot be read ({image}): remove or replace it")
                batch.append(image)
                if len(batch) == batch_size:
                    yield np.stack(batch)
                    batch = []
        if batch:
            yield np.stack(batch)

    return ImageSet(
        name=name, shape=(len(source), image_size, image_size, channels), labels=source.labels() if labelled else None,
        read=read, class_names=source.class_names, left_out=source.left_out,
    )  # fmt: skip


def dataset_images(data: ConfigDict, *, labelled: bool = True) -> ImageSet:
    """The training set of a config's `data` section, as images uint8; `labelled` as `named_images` takes it.

    Raises:
      UserError: the set holds latents, whose reconstructions are no reference.
    """
    if data.name == "latents":
        raise UserError(
            "--reference=dataset: a set of latents holds no images to compare with; give ADM's reference npz "
            "(VIRTUAL_imagenet256_labeled.npz), a statistics file, or the images, imagefolder:DIR"
        )
    if data.name == "pixels":
        return named_images(data.path, data.image_size, data.channels, labelled=labelled)
    dataset, decode = registry.load(data), registry.decoder(data)
    count = len(dataset.source)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, count, batch_size):
            examples = [dataset.source[i] for i in range(start, min(start + batch_size, count))]
            batch = {name: jnp.asarray(np.stack([example[name] for example in examples])) for name in examples[0]}
            yield np.asarray(decode(dataset.encode(batch, None)))

    shape = next(read(1)).shape[1:]
    return ImageSet(
        name=data.path or data.name,
        shape=(count, *shape),
        labels=None if dataset.null else np.array([int(dataset.source[i]["label"]) for i in range(count)], np.int64),
        read=read,
        class_names=dataset.class_names,
    )
