"""The image autoencoder of latent diffusion: AutoencoderKL's encoder and decoder, images in NHWC.

The architecture of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752),
section 3.1, in the shape that Stable Diffusion's VAEs have. Weights come from `sra_jax.interop.autoencoder`.

Example:

    autoencoder = interop.autoencoder.load("stabilityai/sd-vae-ft-ema")
    mean, std = autoencoder.encode(images)                        # images (B,H,W,3) in [-1, 1]
    latents = autoencoder.config.scale(mean + std * noise)        # what the diffusion transformer sees
    images = autoencoder.decode(autoencoder.config.unscale(latents))
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sra_jax.models import operations

NORM_EPSILON = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


def posterior(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moments (...,2C), mean and logarithm of the variance, -> mean and standard deviation, (...,C) float32 each."""
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE))


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The sizes of an AutoencoderKL; the defaults are those of Stable Diffusion 1's VAE (83,653,863 parameters).

    The fields bear the names of diffusers' `config.json`.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0

    @property
    def downsampling(self) -> int:
        """Pixels of the image along one side of a latent's pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scale(self, latents: jax.Array) -> jax.Array:
        """The autoencoder's latents, brought to about unit variance for the diffusion model."""
        return (latents - self.shift_factor) * self.scaling_factor

    def unscale(self, latents: jax.Array) -> jax.Array:
        """The inverse of `scale`."""
        return latents / self.scaling_factor + self.shift_factor


@dataclasses.dataclass(frozen=True)
class _Layers:
    """Makes the layers of one autoencoder: the options that all of them share."""

    groups: int
    dtype: Any
    rngs: nnx.Rngs

    @property
    def precision(self) -> jax.lax.Precision:
        # float32 means float32: TPUs would otherwise multiply in bfloat16, GPUs in TF32
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def conv(self, inputs: int, outputs: int, size: int = 3, strides: int = 1, padding: Any = "SAME") -> nnx.Conv:
        return nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=strides,
            padding=padding,
            dtype=self.dtype,
            precision=self.precision,
            rngs=self.rngs,
        )

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, dtype=self.dtype, precision=self.precision, rngs=self.rngs)

    def norm(self, channels: int) -> "GroupNorm":
        return GroupNorm(channels, self.groups)


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He, arXiv 1803.08494) over positions and the channels of a group, in float32.

    Sums run over the positions of each channel first, whose memory is contiguous in NHWC; only (B,C) sums are
    grouped. The variance is taken about the mean, not as a difference of squares.
    """

    def __init__(self, channels: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B,H,W,C) in any floating type -> the same shape and type."""
        channels = x.shape[-1]
        values = x.astype(jnp.float32)

        def of_group(per_channel: jax.Array) -> jax.Array:  # (B,C) -> (B,1,1,C), each channel its group's mean
            grouped = per_channel.reshape(-1, self.groups, channels // self.groups)
            mean = jnp.broadcast_to(grouped.mean(axis=-1, keepdims=True), grouped.shape)
            return mean.reshape(-1, 1, 1, channels)

        centred = values - of_group(values.mean(axis=(1, 2)))
        variance = of_group(jnp.square(centred).mean(axis=(1, 2)))
        normed = centred * (jax.lax.rsqrt(variance + NORM_EPSILON) * self.scale[...]) + self.bias[...]
        return normed.astype(x.dtype)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the way of x where channels change."""

    def __init__(self, inputs: int, outputs: int, layers: _Layers):
        self.norm1 = layers.norm(inputs)
        self.conv1 = layers.conv(inputs, outputs)
        self.norm2 = layers.norm(outputs)
        self.conv2 = layers.conv(outputs, outputs)
        self.shortcut = layers.conv(inputs, outputs, size=1) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B,H,W,inputs) -> (B,H,W,outputs)."""
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return (x if self.shortcut is None else self.shortcut(x)) + hidden


class PositionAttention(nnx.Module):
    """x + one head of self-attention among all positions of an image, over normed x; the softmax is in float32."""

    def __init__(self, channels: int, layers: _Layers):
        self.norm = layers.norm(channels)
        self.query = layers.linear(channels, channels)
        self.key = layers.linear(channels, channels)
        self.value = layers.linear(channels, channels)
        self.out = layers.linear(channels, channels)
        self.precision = layers.precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B,H,W,C) -> (B,H,W,C)."""
        batch, height, width, channels = x.shape
        tokens = self.norm(x).reshape(batch, height * width, channels)
        one_head = jnp.stack([made(tokens) for made in (self.query, self.key, self.value)], axis=2)[:, :, :, None]
        mixed = operations.attend(one_head, self.precision)
        return x + self.out(mixed).reshape(x.shape)


class MidBlock(nnx.Module):
    """Residual block, attention (where the config has it), residual block."""

    def __init__(self, channels: int, attention: bool, layers: _Layers):
        self.resnets = nnx.List([ResidualBlock(channels, channels, layers) for _ in range(2)])
        self.attention = PositionAttention(channels, layers) if attention else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B,H,W,C) -> (B,H,W,C)."""
        x = self.resnets[0](x)
        if self.attention is not None:
            x = self.attention(x)
        return self.resnets[1](x)


class DownStage(nnx.Module):
    """Residual blocks at one resolution, then (except in the last stage) a convolution that halves it."""

    def __init__(self, inputs: int, outputs: int, depth: int, last: bool, layers: _Layers):
        self.resnets = nnx.List([ResidualBlock(inputs if i == 0 else outputs, outputs, layers) for i in range(depth)])
        # only the right and the bottom edge are padded
        self.downsample = None if last else layers.conv(outputs, outputs, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B,H,W,inputs) -> (B,H/2,W/2,outputs), or (B,H,W,outputs) in the last stage."""
        for block in self.resnets:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class UpStage(nnx.Module):
    """Residual blocks at one resolution, then (except in the last stage) pixels doubled and convolved."""

    def __init__(self, inputs: int, outputs: int, depth: int, last: bool, layers: _Layers):
        self.resnets = nnx.List([ResidualBlock(inputs if i == 0 else outputs, outputs, layers) for i in range(depth)])
        self.upsample = None if last else layers.conv(outputs, outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B,H,W,inputs) -> (B,2H,2W,outputs), or (B,H,W,outputs) in the last stage."""
        for block in self.resnets:
            x = block(x)
        if self.upsample is None:
            return x
        return self.upsample(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Encoder(nnx.Module):
    """Images to moments, before the 1x1 convolution that closes the encoder."""

    def __init__(self, config: AutoencoderConfig, layers: _Layers):
        widths = config.block_out_channels
        self.conv_in = layers.conv(config.in_channels, widths[0])
        self.down = nnx.List(
            [
                DownStage(widths[max(i - 1, 0)], width, config.layers_per_block, i == len(widths) - 1, layers)
                for i, width in enumerate(widths)
            ]
        )
        self.mid = MidBlock(widths[-1], config.mid_block_add_attention, layers)
        self.norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], 2 * config.latent_channels)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(B,H,W,in_channels) -> (B,h,w,2*latent_channels)."""
        x = self.conv_in(images)
        for stage in self.down:
            x = stage(x)
        return self.conv_out(nnx.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents to images, after the 1x1 convolution that opens the decoder."""

    def __init__(self, config: AutoencoderConfig, layers: _Layers):
        widths = config.block_out_channels[::-1]
        self.conv_in = layers.conv(config.latent_channels, widths[0])
        self.mid = MidBlock(widths[0], config.mid_block_add_attention, layers)
        self.up = nnx.List(
            [
                UpStage(widths[max(i - 1, 0)], width, config.layers_per_block + 1, i == len(widths) - 1, layers)
                for i, width in enumerate(widths)
            ]
        )
        self.norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], config.out_channels)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """(B,h,w,latent_channels) -> (B,H,W,out_channels)."""
        x = self.mid(self.conv_in(latents))
        for stage in self.up:
            x = stage(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Encoder and decoder with a Gaussian posterior of diagonal covariance.

    Attributes:
      dtype: type of convolutions and matrix products; parameters, norms and the softmax stay float32.
    """

    def __init__(self, config: AutoencoderConfig, dtype: Any = jnp.float32, *, rngs: nnx.Rngs):
        layers = _Layers(config.norm_num_groups, jnp.dtype(dtype), rngs)
        moments = 2 * config.latent_channels
        self.dtype = layers.dtype
        self.encoder = Encoder(config, layers)
        self.decoder = Decoder(config, layers)
        self.quant_conv = layers.conv(moments, moments, size=1) if config.use_quant_conv else None
        self.post_quant_conv = (
            layers.conv(config.latent_channels, config.latent_channels, size=1) if config.use_post_quant_conv else None
        )

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The posterior of images (B,H,W,C) in [-1, 1].

        Returns:
          mean and standard deviation, each (B,h,w,latent_channels) float32, not scaled; the logarithm of the variance
          is clipped to [-30, 20], so the standard deviation lies in [3.1e-7, 2.2e4].
        """
        moments = self.encoder(images.astype(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return posterior(moments)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images (B,H,W,C) float32, about [-1, 1] and not clipped, of unscaled latents (B,h,w,latent_channels)."""
        latents = latents.astype(self.dtype)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)


def abstract_model(config: AutoencoderConfig, dtype: Any = jnp.float32) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The graph of an AutoencoderKL and the tree of its parameters' shapes; nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(config, dtype, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def map_slices(function: Callable[[jax.Array], Any], batch: jax.Array, slice_size: int, shards: int = 1) -> Any:
    """`function(batch)`, computed a slice of the batch at a time so that only one slice's activations are in memory.

    Args:
      function: acts on every example alone; (n,...) -> a tree of (n,...).
      batch: (B,...), B a multiple of `shards`.
      slice_size: examples of one shard in a slice; a last, smaller slice is computed by itself.
      shards: devices over which the leading axis is split. Every slice takes as many examples from each of them, so
        that all devices work on every slice and no example moves.

    Returns:
      What `function(batch)` returns.
    """
    per_shard = batch.shape[0] // shards
    slice_size = min(slice_size, per_shard)
    by_shard = batch.reshape(shards, per_shard, *batch.shape[1:])
    whole = per_shard - per_shard % slice_size

    def of_slice(part: jax.Array) -> Any:  # (shards,n,...) -> tree of (shards,n,...)
        flat = function(part.reshape(-1, *part.shape[2:]))
        return jax.tree.map(lambda x: x.reshape(*part.shape[:2], *x.shape[1:]), flat)

    def of_whole(part: jax.Array) -> Any:  # (shards,whole,...) -> tree of (shards,whole,...)
        slices = part.reshape(shards, -1, slice_size, *part.shape[2:])
        mapped = jax.lax.map(of_slice, jnp.moveaxis(slices, 1, 0))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(shards, whole, *x.shape[3:]), mapped)

    parts = [(of_slice if whole == slice_size else of_whole)(by_shard[:, :whole])]
    if whole < per_shard:
        parts.append(of_slice(by_shard[:, whole:]))
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *parts)
    return jax.tree.map(lambda x: x.reshape(batch.shape[0], *x.shape[2:]), joined)


def batch_shards(batch: jax.Array) -> int:
    """Over how many devices the leading axis of an array is split."""
    return math.ceil(batch.shape[0] / batch.sharding.shard_shape(batch.shape)[0])


class Autoencoder:
    """An AutoencoderKL with its weights, ready to encode and decode batches of any sharding.

    Attributes:
      config: its sizes and scaling.
      name: where the weights came from, for messages and manifests.
      fingerprint: SHA-256 of the weights' file in hexadecimal digits, or None.
      dtype: type of convolutions and matrix products.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        params: dict[str, Any],
        *,
        dtype: Any = jnp.float32,
        name: str = "",
        fingerprint: str | None = None,
    ):
        self.config = config
        self.name = name
        self.fingerprint = fingerprint
        self.dtype = jnp.dtype(dtype)
        self._host_params = params
        self._params_on: dict[Any, dict[str, Any]] = {}
        graphdef, _ = abstract_model(config, dtype)

        def to_uint8(model: AutoencoderKL, latents: jax.Array) -> jax.Array:
            images = model.decode(config.unscale(latents))
            return jnp.clip((images + 1.0) / 2.0 * 255.0, 0.0, 255.0).astype(jnp.uint8)

        def compiled(job: Callable[[AutoencoderKL, jax.Array], Any]) -> Callable[..., Any]:
            def run(params: dict[str, Any], batch: jax.Array, slice_size: int, shards: int) -> Any:
                model = nnx.merge(graphdef, params)
                return map_slices(lambda part: job(model, part), batch, slice_size, shards)

            return jax.jit(run, static_argnums=(2, 3))

        self._encode = compiled(AutoencoderKL.encode)
        self._decode = compiled(AutoencoderKL.decode)
        self._decode_uint8 = compiled(to_uint8)

    def params(self, batch: jax.Array) -> dict[str, Any]:
        """The parameters on the devices that hold `batch`, a copy on each; moved there once."""
        sharding = batch.sharding
        target = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
        if target not in self._params_on:
            self._params_on = {target: jax.device_put(self._host_params, target)}
        return self._params_on[target]

    def encode(self, images: jax.Array, slice_size: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of images (B,H,W,C) in [-1, 1]; see `AutoencoderKL.encode`.

        Args:
          images: H and W multiples of `config.downsampling`.
          slice_size: images that a device encodes at a time; by default 1 on a CPU, which one image keeps busy and
            whose caches it fits best, and 8 elsewhere.
        """
        images = jnp.asarray(images)
        if slice_size is None:
            slice_size = 1 if next(iter(images.devices())).platform == "cpu" else 8
        return self._encode(self.params(images), images, slice_size, batch_shards(images))

    def decode(self, latents: jax.Array, slice_size: int = 1) -> jax.Array:
        """Images of unscaled latents (B,h,w,C); see `AutoencoderKL.decode`.

        Args:
          latents: unscaled: `config.unscale` undoes the scaling.
          slice_size: latents that a device decodes at a time: one 512x512 image fits on any device that can train.
        """
        latents = jnp.asarray(latents)
        return self._decode(self.params(latents), latents, slice_size, batch_shards(latents))

    def __call__(self, latents: jax.Array) -> jax.Array:
        """`decode_uint8`."""
        return self.decode_uint8(latents)

    def decode_uint8(self, latents: jax.Array, slice_size: int = 1) -> jax.Array:
        """Images (B,H,W,C) uint8 of *scaled* latents (B,h,w,C): (x+1)/2*255, clipped to [0, 255] and truncated.

        Truncation rather than rounding follows the authors' sampling code, on which published FIDs rest.
        """
        latents = jnp.asarray(latents)
        return self._decode_uint8(self.params(latents), latents, slice_size, batch_shards(latents))
