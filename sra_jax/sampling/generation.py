"""Images from a model's parameters: sample i is a function of (parameters, seed, i, its label or prompt) alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.data import registry as datasets
from sra_jax.data.captions import Captions
from sra_jax.data.dataset import Decoder
from sra_jax.diffusion.guidance import Condition
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.methods.correction import LatentMeans
from sra_jax.runs import latent_means
from sra_jax.runs.state import Networks, Params, placement_on
from sra_jax.runs.trained import TrainedModel

LABEL_STREAM = 2**31 - 1

Asked = str | Sequence[Any]
"""What samples are to show: labels by the name of a scheme or one by one, or prompts."""


def labels_for(indices: np.ndarray, scheme: Asked, num_classes: int, seed: int) -> np.ndarray:
    """Labels (N,) int32 of samples `indices` (N,).

    Args:
      indices: sample numbers from 0.
      scheme: "balanced" takes the classes in turn, "uniform" draws each from (seed, index), a list is repeated.
      num_classes: classes of the model.
      seed: of the draws.

    Raises:
      UserError: an unknown scheme or a class that does not exist.
    """
    if scheme == "balanced":
        return (indices % num_classes).astype(np.int32)
    if scheme == "uniform":
        keys = jax.vmap(lambda i: jax.random.fold_in(_sample_key(seed, i), LABEL_STREAM))(jnp.asarray(indices))
        return np.asarray(jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes))(keys), np.int32)
    if isinstance(scheme, str):
        raise UserError(
            f"labels={scheme!r} is unknown; allowed: balanced, uniform, or class numbers such as 3 or 1,5,7"
        )
    wrong = [label for label in map(int, scheme) if not 0 <= label < num_classes]
    if wrong or not scheme:
        raise UserError(f"labels={','.join(map(str, wrong or scheme))}: classes run from 0 to {num_classes - 1}")
    return np.asarray(scheme, np.int32)[indices % len(scheme)]


def _sample_key(seed: int, index: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), index)


def make_sampler(
    config: ConfigDict, networks: Networks, means: LatentMeans | None = None, null: Condition | None = None
) -> Callable[[Params, jax.Array, Condition, Any], jax.Array]:
    """The pure function `sample(params, indices, told, seed) -> latents` from noise to latents, to be jitted.

    Args:
      config: its `sampling` section says how.
      networks: the run's.
      means: of its training set, where its method's shift of the velocity is taken back.
      null: the empty caption, where the network is told captions.

    Returns:
      A function of the parameters, sample numbers (B,), labels or captions (B,...) and the seed; latents (B,H,W,C)
      float32.
    """
    process, sampler = config_lib.process_of(config), config_lib.sampler_of(config)
    guidance, correction = config_lib.guidance_of(config, null), config_lib.correction_of(config, means)
    true_velocity = correction.correct if correction else lambda denoise: denoise
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    options = {name: config.sampling[name] for name in sampler.options}

    def sample(params: Params, indices: jax.Array, told: Condition, seed: Any) -> jax.Array:
        keys = jax.vmap(lambda i: _sample_key(seed, i))(indices)

        def normals(stream: Any) -> jax.Array:  # stream 0 is the initial noise, i + 1 that of step i
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape))(keys)

        def denoise(x: jax.Array, t: jax.Array, y: Condition) -> jax.Array:
            prediction, _ = networks.model(params)(x, t, y)
            assert prediction is not None, "only a network that is stopped predicts nothing"
            return prediction

        return sampler.sample(
            process, true_velocity(denoise), normals(0), told, lambda i: normals(i + 1), steps=config.sampling.steps,
            guidance=guidance, **options,
        )  # fmt: skip

    return sample


class Generator:
    """Batches of images from one model over a mesh.

    Args:
      config: the run's config, its `sampling` section as wanted now.
      mesh: the batch is split over all its devices.
      decoder: latents to uint8 images.
      batch_size: images at a time; rounded up to a multiple of the number of devices.
      seed: of the noise and of uniform labels.
      means: of the run's training set, as `latent_means.read` gives them.
    """

    def __init__(
        self, config: ConfigDict, mesh: Mesh, decoder: Decoder, batch_size: int, seed: int,
        means: LatentMeans | None = None,
    ):
        self._config, self._mesh, self._decoder, self._seed = config, mesh, decoder, seed
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        split = sharding.batch_sharding(mesh)
        networks = Networks(config, placement_on(mesh, config))
        self._encoder = datasets.text_encoder(config.data) if config_lib.tells_captions(config) else None
        null = self._encoder.null if self._encoder else None
        self._sample = jax.jit(make_sampler(config, networks, means, null), out_shardings=split)
        self._all_finite = jax.jit(lambda latents: jnp.isfinite(latents).all(), out_shardings=sharding.replicated(mesh))

    def lower(self, params: Params) -> jax.stages.Lowered:
        """The program that `images` runs, for parameters that may be shapes with shardings."""
        split = sharding.batch_sharding(self._mesh)
        rows = jax.ShapeDtypeStruct((self.batch_size,), np.int32, sharding=split)
        told: Any = rows
        if self._encoder:
            told = {
                name: jax.ShapeDtypeStruct((self.batch_size, *array.shape), array.dtype, sharding=split)
                for name, array in self._encoder.null.items()
            }
        return self._sample.lower(params, rows, told, np.uint32(self._seed))

    def describe(self) -> dict[str, Any]:
        """How the samples are made: for results, and to tell whether two sets of samples are the same."""
        sampling = {k: v for k, v in self._config.sampling.items() if not k.startswith("preview_")}
        if not config_lib.methods_of(self._config).correcting:
            del sampling["correction"]  # it is about nothing
        return {**sampling, "seed": self._seed}

    def decoder_weights(self) -> str | None:
        """SHA-256 of the weights that turn latents into images; None where it takes none, or they have no file."""
        return getattr(self._decoder, "fingerprint", None)

    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, pixels; one latent of zeros is decoded to know it."""
        size, channels = self._config.data.image_size, self._config.data.channels
        _, height, width, _ = self._decoder(jnp.zeros((1, size, size, channels))).shape
        return height, width

    def images(
        self, params: Params, count: int, labels: Asked = "balanced", start: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Samples `start` .. `count` - 1, batch by batch.

        Args:
          params: {"model": ...}, the EMA's for samples worth looking at.
          count: number of samples, counted from sample 0.
          labels: as `labels_for` takes them; of a model that is told captions, prompts that are taken in turn.
          start: number of the first sample to make.

        Yields:
          Images (n,H,W,C) uint8 and their labels (n,) int32, or numbers of their prompts.

        Raises:
          UserError: a sample holds NaN or infinite values, of which no image can be made.
        """
        for first in range(start, count, self.batch_size):
            indices = np.arange(first, first + self.batch_size, dtype=np.int32)
            chosen, told = self._told(indices, labels)
            put = sharding.put_rows({"indices": indices, "told": told}, self._mesh)
            latents = self._sample(params, put["indices"], put["told"], np.uint32(self._seed))
            keep = min(count - first, self.batch_size)
            if not self._all_finite(latents):
                raise UserError(
                    f"samples {first} to {first + keep - 1} hold NaN or infinite values: these parameters have "
                    "diverged; choose an earlier checkpoint, or a smaller sampling.guidance_scale"
                )
            images = self._decoder(latents)
            yield sharding.gather(images)[:keep], chosen[:keep]

    def _told(self, indices: np.ndarray, labels: Asked) -> tuple[np.ndarray, np.ndarray | Captions]:
        """Labels, or numbers of prompts, (N,) int32 of samples `indices` (N,), and what the network is told of them."""
        if self._encoder is None:
            chosen = labels_for(indices, labels, self._config.data.num_classes, self._seed)
            return chosen, chosen
        if isinstance(labels, str) or not labels:
            raise UserError("this run is told captions: give --prompt or --prompts in place of labels")
        chosen = (indices % len(labels)).astype(np.int32)
        numbers, places = np.unique(chosen, return_inverse=True)
        embedded = self._encoder([labels[number] for number in numbers])
        return chosen, {name: array[places] for name, array in embedded.items()}


def generator_of(model: TrainedModel, batch_size: int, seed: int) -> Generator:
    """Images from a trained model with its config's sampler and guidance."""
    means = latent_means.read(model.config, model.workdir)
    return Generator(model.config, model.mesh, datasets.decoder(model.config.data), batch_size, seed, means)
