"""Where datasets are looked up by name: a new one is its file and a line here."""

from types import ModuleType

from ml_collections import ConfigDict
from PIL import Image

from sra_jax.data import digits, latents, pixels, synthetic
from sra_jax.data.dataset import Dataset, Decoder, Example
from sra_jax.errors import UserError

SOURCES: dict[str, ModuleType] = {
    "digits": digits,
    "latents": latents,
    "pixels": pixels,
    "synthetic": synthetic,
}
"""Each module has `load(data) -> Dataset` and `decoder(data) -> Decoder`, given the config's `data` section, and, where
pictures can become examples, `example_from_image(data, picture) -> Example`."""


def _module(data: ConfigDict) -> ModuleType:
    if data.name not in SOURCES:
        raise UserError(f"data.name={data.name!r} is unknown; allowed: {', '.join(SOURCES)}")
    return SOURCES[data.name]


def load(data: ConfigDict) -> Dataset:
    """The training set that the config's `data` section names.

    Raises:
      UserError: an unknown name, missing files, or a set whose shape or classes differ from the config's.
    """
    dataset = _module(data).load(data)
    found = {
        "image_size": dataset.latent_shape[0], "channels": dataset.latent_shape[2], "num_classes": dataset.num_classes
    }  # fmt: skip
    for key, value in found.items():
        if data[key] != value:
            raise UserError(f"data.{key}={data[key]} does not fit data.name={data.name!r}, which has {value}; set "
                            f"--config.data.{key}={value}")  # fmt: skip
    return dataset


def decoder(data: ConfigDict) -> Decoder:
    """What turns the model's latents of this set into images; needs no training examples."""
    return _module(data).decoder(data)


def example_from_image(data: ConfigDict, picture: Image.Image) -> Example:
    """An example of the set that `data` names, made from any square RGB picture; its label is 0.

    Raises:
      UserError: the set does not consist of pictures.
    """
    module = _module(data)
    if not hasattr(module, "example_from_image"):
        raise UserError(f"data.name={data.name!r} has no way from a picture file to an example; use --example")
    return module.example_from_image(data, picture)
