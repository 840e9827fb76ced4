"""Where datasets are looked up by name: a new one is its file and a line here."""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType

from ml_collections import ConfigDict
from PIL import Image

from sra_jax import config as config_lib
from sra_jax.data import digits, digits_captions, features, latents, pixels, shards, synthetic
from sra_jax.data.caption_shards import WithCaptions
from sra_jax.data.captions import Encoder
from sra_jax.data.dataset import Dataset, Decoder, Example
from sra_jax.errors import UserError

SOURCES: dict[str, ModuleType] = {
    "digits": digits,
    "digits_captions": digits_captions,
    "latents": latents,
    "pixels": pixels,
    "synthetic": synthetic,
}
"""Each module has `load(data) -> Dataset` and `decoder(data) -> Decoder`, given the config's `data` section; where
pictures can become examples, `example_from_image(data, picture) -> Example`; and where there are captions,
`text_encoder(data) -> Encoder` and, where the set brings prompts, `PROMPT_LISTS`."""


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
    told = "captions" if dataset.null else "labels"
    if told != ("captions" if "context_width" in data else "labels"):
        raise UserError(
            f"data.name={data.name!r} has {told}, which this recipe's model.name is not made for: mmdit is told "
            "captions, transformer labels"
        )
    if dataset.null:
        found["context_length"], found["context_width"] = dataset.null["context"].shape
    for key, value in found.items():
        if data[key] != value:
            raise UserError(f"data.{key}={data[key]} does not fit data.name={data.name!r}, which has {value}; set "
                            f"--config.data.{key}={value}")  # fmt: skip
    return dataset


def training_set(config: ConfigDict) -> Dataset:
    """The training set of a recipe, with the stored features that its method compares with.

    Sets other than prepared latents have none; methods then take a stand-in.

    Raises:
      UserError: as `load`; or prepared latents have no such features, or other ones.
    """
    dataset, methods = load(config.data), config_lib.methods_of(config)
    widths = methods.feature_widths
    if not widths or config.data.name != "latents":
        return dataset
    stored = features.read(config.data.path)
    if stored is None:
        raise UserError(
            f"method.name={methods.name!r} compares with features that {config.data.path} does not hold: python "
            f"tools/prepare_latents.py --features=DIR --output={config.data.path} stores them, one array (tokens, "
            "channels) an example"
        )
    tokens = config_lib.transformer_of(config).tokens
    if (stored.tokens, stored.widths) != (tokens, widths):
        raise UserError(
            f"the features in {config.data.path} have {stored.tokens} tokens and widths {stored.widths}; model.patch="
            f"{config.model.patch} makes {tokens} tokens, and the method's widths are {widths}"
        )
    folder = str(shards.local_folder(config.data.path, stored.shards, config.data.get("cache", "")))
    source = dataset.source
    if isinstance(source, WithCaptions):
        both = source.over(features.WithFeatures(source.latents, folder, stored))
        return dataclasses.replace(dataset, source=both)
    return dataclasses.replace(dataset, source=features.WithFeatures(source, folder, stored))


def decoder(data: ConfigDict) -> Decoder:
    """What turns the model's latents of this set into images; needs no training examples."""
    return _module(data).decoder(data)


def text_encoder(data: ConfigDict) -> Encoder:
    """What turns captions into what the network is told, by the set's own text encoder.

    Raises:
      UserError: the set has no captions, or its encoder cannot be found.
    """
    module = _module(data)
    if not hasattr(module, "text_encoder"):
        raise UserError(f"data.name={data.name!r} has no captions")
    return module.text_encoder(data)


def prompt_lists(data: ConfigDict) -> Mapping[str, Callable[[int, int], list[str]]]:
    """Lists of prompts that the set brings, by name: each gives so many, chosen by a seed. Most sets have none."""
    return getattr(_module(data), "PROMPT_LISTS", {})


def example_from_image(data: ConfigDict, picture: Image.Image) -> Example:
    """An example of the set that `data` names, made from any square RGB picture; its label is 0, its caption the
    empty one.

    Raises:
      UserError: the set does not consist of pictures.
    """
    module = _module(data)
    if not hasattr(module, "example_from_image"):
        raise UserError(f"data.name={data.name!r} has no way from a picture file to an example; use --example")
    return module.example_from_image(data, picture)
