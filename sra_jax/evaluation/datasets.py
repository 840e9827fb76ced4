"""Training sets as images to compare with: what `--reference=digits` or `--reference=idx:FOLDER` means."""

from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.data import image_sources, registry
from sra_jax.errors import UserError
from sra_jax.evaluation.images import ImageSet

PREFIXES = ("idx:", "imagefolder:", "tfds:", "sklearn:")
OWN = "dataset"


def is_dataset(name: str) -> bool:
    """Whether a reference is named as a dataset rather than as a file or folder."""
    return name in (OWN, "digits") or name.startswith(PREFIXES)


def named_images(name: str, image_size: int, channels: int) -> ImageSet:
    """The images of a dataset, at the size and in the colours of the samples.

    Args:
      name: digits, or a source as tools/prepare_latents.py names it, such as idx:FOLDER.
      image_size: height and width, pixels.
      channels: 1 or 3.

    Raises:
      UserError: there is no such set, or it does not come in this size.
    """
    data = config_lib.default().data
    if name == "digits":
        data.update(name="digits", image_size=8, channels=1, num_classes=10)
        if (image_size, channels) != (8, 1):
            raise UserError(f"the digits are 8x8 grey images, the samples {image_size}x{image_size} with {channels}")
    else:
        classes = image_sources.open_images(name).num_classes
        data.update(name="pixels", path=name, image_size=image_size, channels=channels, num_classes=classes)
    return dataset_images(data)


def dataset_images(data: ConfigDict) -> ImageSet:
    """The training set of a config's `data` section, as images uint8.

    Raises:
      UserError: the set holds latents, whose reconstructions are no reference.
    """
    if data.name == "latents":
        raise UserError(
            "--reference=dataset: a set of latents holds no images to compare with; give ADM's reference npz "
            "(VIRTUAL_imagenet256_labeled.npz), a statistics file, or the images, imagefolder:DIR"
        )
    dataset, decode = registry.load(data), registry.decoder(data)
    count = len(dataset.source)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, count, batch_size):
            examples = [dataset.source[i] for i in range(start, min(start + batch_size, count))]
            batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
            yield np.asarray(decode(dataset.encode(batch, None)))

    shape = next(read(1)).shape[1:]
    return ImageSet(
        name=data.path or data.name,
        shape=(count, *shape),
        labels=np.array([int(dataset.source[i]["label"]) for i in range(count)], np.int64),
        read=read,
    )
