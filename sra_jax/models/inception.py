"""The FID Inception network: Inception-v3 as TensorFlow's 2015-12-05 graph computes it, in Flax NNX.

Differences from the Inception-v3 of model zoos (Szegedy et al., arXiv 1512.00567), all of which move FID:

* images are resized to 299x299 by TensorFlow 1's bilinear rule and scaled to (x - 128) / 128;
* 3x3 average pools divide by the number of pixels inside the image, not by 9;
* the last block, 7c, pools by the maximum;
* the classifier has 1008 outputs; the inception score uses them without the bias.

Two rewritings make the network cheaper without changing what it computes. Batch normalisation is folded into the
convolutions when weights are converted (`sra_jax.interop.inception`). And 1x1 convolutions that read the same tensor
are one convolution: `pointwise`. The pooling branch is part of it, because averaging and a 1x1 convolution commute
(weights of an average sum to one, so the bias passes through as well).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

INPUT_SIZE = 299
POOL_FEATURES = 2048
NUM_LOGITS = 1008
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS

# Checkpoints are float32 and published numbers come from float32 arithmetic; accelerators round to less by default.
PRECISION = jax.lax.Precision.HIGHEST


class InceptionFeatures(NamedTuple):
    """What the network says of N images, float32.

    Attributes:
      pool: (N,2048), the average over the last 8x8 map: FID, precision, recall, KID.
      logits: (N,1008), class scores without the bias: inception score.
      spatial: (N,2023), the first 7 channels of the 17x17 map `mixed_6/conv`, row, column, channel: sFID.
    """

    pool: jax.Array
    logits: jax.Array
    spatial: jax.Array


def _source_pixels(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every output pixel: the lower and upper source pixel and the upper one's weight, float32 as in TensorFlow."""
    position = np.arange(size_out, dtype=np.float32) * np.float32(size_in / size_out)
    lower = position.astype(np.int32)
    upper = np.minimum(lower + 1, size_in - 1)
    return lower, upper, position - lower.astype(np.float32)


def resize_bilinear_tf1(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes as `tf.image.resize_bilinear` of TensorFlow 1 does.

    No half-pixel shift, no aligned corners, no antialiasing: output pixel i reads source coordinate i * (in / out).

    Args:
      images: (N,H,W,C), any real type.
      size: (H',W') of the result.

    Returns:
      (N,H',W',C) float32 in the range of `images`.
    """
    images = images.astype(jnp.float32)
    if tuple(images.shape[1:3]) == tuple(size):
        return images
    top, bottom, y_weight = _source_pixels(images.shape[1], size[0])
    left, right, x_weight = _source_pixels(images.shape[2], size[1])
    x_weight, y_weight = x_weight[:, None], y_weight[:, None, None]
    at_left, at_right = images[:, :, left], images[:, :, right]
    images = at_left + (at_right - at_left) * x_weight  # (N,H,W',C)
    at_top, at_bottom = images[:, top], images[:, bottom]
    return at_top + (at_bottom - at_top) * y_weight  # (N,H',W',C)


class Convolution(nnx.Conv):
    """k x k convolution with bias, `SAME` or `VALID`: (N,H,W,inputs) -> (N,H',W',outputs)."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int], *, stride: int = 1, valid: bool = False):
        self.stride = stride
        size = (size, size) if isinstance(size, int) else size
        self.lost = (size[0] - 1, size[1] - 1) if valid else (0, 0)
        # XLA's CPU backend has a kernel for padded convolutions that is up to three times as fast as the one for
        # `VALID`. One surplus pixel at the far side chooses it; what it adds to the output is cut off.
        padding = [(0, 1), (0, 1)] if valid else "SAME"
        super().__init__(inputs, outputs, size, stride, padding=padding, precision=PRECISION, rngs=nnx.Rngs(0))

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        sizes = zip(inputs.shape[1:3], self.lost, strict=True)
        height, width = ((n - lost - 1) // self.stride + 1 for n, lost in sizes)
        return super().__call__(inputs, out_sharding)[:, :height, :width]


def _pointwise(inputs: int, outputs: int) -> nnx.Linear:
    """1x1 convolution: a matrix product over the channels."""
    return nnx.Linear(inputs, outputs, precision=PRECISION, rngs=nnx.Rngs(0))


def _three(x: jax.Array, axis: int, stride: int) -> list[jax.Array]:
    """The three shifted views of a 3-wide window along one axis, without padding."""
    length = (x.shape[axis] - 3) // stride + 1
    stop = (length - 1) * stride + 1
    return [jax.lax.slice_in_dim(x, start, start + stop, stride, axis) for start in range(3)]


def _max_pool(x: jax.Array, stride: int = 2) -> jax.Array:
    """3x3 maximum without padding, one axis at a time: (N,H,W,C) -> (N,(H-3)//stride+1,(W-3)//stride+1,C)."""
    for axis in (2, 1):
        x = functools.reduce(jnp.maximum, _three(x, axis, stride))
    return x


def _average_pool(x: jax.Array) -> jax.Array:
    """3x3 mean with stride 1 over the pixels that exist: (N,H,W,C) -> (N,H,W,C)."""

    def pixels(length: int) -> np.ndarray:
        return np.convolve(np.ones(length, np.float32), np.ones(3, np.float32), mode="same")

    count = pixels(x.shape[1])[:, None] * pixels(x.shape[2])
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for axis in (2, 1):
        x = functools.reduce(jnp.add, _three(x, axis, 1))
    return x / count[:, :, None]


def _split(x: jax.Array, *widths: int) -> list[jax.Array]:
    return jnp.split(x, np.cumsum(widths)[:-1].tolist(), axis=-1)


class BlockA(nnx.Module):
    """Mixed 5b, 5c, 5d: (N,35,35,inputs) -> (N,35,35,224 + pooled)."""

    def __init__(self, inputs: int, pooled: int):
        self.widths = (64, 48, 64, pooled)
        self.pointwise = _pointwise(inputs, sum(self.widths))
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        direct, five, three, pooled = _split(self.pointwise(x), *self.widths)
        five = nnx.relu(self.branch5x5_2(nnx.relu(five)))
        three = nnx.relu(self.branch3x3dbl_2(nnx.relu(three)))
        three = nnx.relu(self.branch3x3dbl_3(three))
        return jnp.concatenate([nnx.relu(direct), five, three, nnx.relu(_average_pool(pooled))], axis=-1)


class BlockB(nnx.Module):
    """Mixed 6a: (N,35,35,inputs) -> (N,17,17,480 + inputs)."""

    def __init__(self, inputs: int):
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2, valid=True)
        self.branch3x3dbl_1 = _pointwise(inputs, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, valid=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        double = nnx.relu(self.branch3x3dbl_1(x))
        double = nnx.relu(self.branch3x3dbl_2(double))
        double = nnx.relu(self.branch3x3dbl_3(double))
        return jnp.concatenate([nnx.relu(self.branch3x3(x)), double, _max_pool(x)], axis=-1)


class BlockC(nnx.Module):
    """Mixed 6b to 6e: (N,17,17,768) -> (N,17,17,768), and the output of its plain 1x1 branch (N,17,17,192)."""

    def __init__(self, inner: int):
        self.widths = (192, inner, inner, 192)
        self.pointwise = _pointwise(768, sum(self.widths))
        self.branch7x7_2 = Convolution(inner, inner, (1, 7))
        self.branch7x7_3 = Convolution(inner, 192, (7, 1))
        self.branch7x7dbl_2 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_3 = Convolution(inner, inner, (1, 7))
        self.branch7x7dbl_4 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_5 = Convolution(inner, 192, (1, 7))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        direct, seven, double, pooled = _split(self.pointwise(x), *self.widths)
        direct = nnx.relu(direct)
        seven = nnx.relu(self.branch7x7_2(nnx.relu(seven)))
        seven = nnx.relu(self.branch7x7_3(seven))
        double = nnx.relu(self.branch7x7dbl_2(nnx.relu(double)))
        double = nnx.relu(self.branch7x7dbl_3(double))
        double = nnx.relu(self.branch7x7dbl_4(double))
        double = nnx.relu(self.branch7x7dbl_5(double))
        return jnp.concatenate([direct, seven, double, nnx.relu(_average_pool(pooled))], axis=-1), direct


class BlockD(nnx.Module):
    """Mixed 7a: (N,17,17,768) -> (N,8,8,1280)."""

    def __init__(self) -> None:
        self.widths = (192, 192)
        self.pointwise = _pointwise(768, sum(self.widths))
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, valid=True)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, valid=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        three, seven = _split(nnx.relu(self.pointwise(x)), *self.widths)
        seven = nnx.relu(self.branch7x7x3_2(seven))
        seven = nnx.relu(self.branch7x7x3_3(seven))
        seven = nnx.relu(self.branch7x7x3_4(seven))
        return jnp.concatenate([nnx.relu(self.branch3x3_2(three)), seven, _max_pool(x)], axis=-1)


class BlockE(nnx.Module):
    """Mixed 7b (average pool) and 7c (max pool): (N,8,8,inputs) -> (N,8,8,2048)."""

    def __init__(self, inputs: int, *, max_pool: bool):
        self.max_pool = max_pool
        # Taking a maximum does not commute with a convolution: that branch keeps its own.
        self.widths = (320, 384, 448) if max_pool else (320, 384, 448, 192)
        self.pointwise = _pointwise(inputs, sum(self.widths))
        if max_pool:
            self.branch_pool = _pointwise(inputs, 192)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))

    def __call__(self, x: jax.Array) -> jax.Array:
        direct, three, double, *rest = _split(self.pointwise(x), *self.widths)
        if self.max_pool:
            padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # x >= 0: a zero never wins over a pixel
            pooled = self.branch_pool(_max_pool(padded, stride=1))
        else:
            pooled = _average_pool(rest[0])
        three = nnx.relu(three)
        double = nnx.relu(self.branch3x3dbl_2(nnx.relu(double)))
        branches = [
            direct,
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            pooled,
        ]
        return nnx.relu(jnp.concatenate(branches, axis=-1))


RESIZES = ("tf1", "pytorch")
"""How images come to 299x299: as in ADM's suite, or as in pytorch-fid, to which published text-to-image FIDs refer."""


def resized(images: jax.Array, resize: str) -> jax.Array:
    """Images (N,H,W,3), 0..255, as the network takes them: (N,299,299,3) float32 in about [-1, 1].

    tf1: TensorFlow 1's bilinear rule, then (x - 128) / 128. pytorch: bilinear between the centres of pixels without
    smoothing, as `torch.nn.functional.interpolate` does, then 2 x / 255 - 1.
    """
    if resize == "tf1":
        return (resize_bilinear_tf1(images, (INPUT_SIZE, INPUT_SIZE)) - 128) / 128
    shape = (images.shape[0], INPUT_SIZE, INPUT_SIZE, images.shape[-1])
    small = jax.image.resize(
        images.astype(jnp.float32) / 255, shape, "bilinear", antialias=False, precision=jax.lax.Precision.HIGHEST
    )
    return 2 * small - 1


class Inception(nnx.Module):
    """The whole network: uint8 images of any size -> `InceptionFeatures`.

    Build it abstractly, `nnx.eval_shape(Inception)`, and give it parameters by `nnx.merge(graphdef, parameters)`: those
    of `sra_jax.interop.inception`.
    """

    def __init__(self) -> None:
        self.conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, valid=True)
        self.conv2d_2a_3x3 = Convolution(32, 32, 3, valid=True)
        self.conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.conv2d_3b_1x1 = _pointwise(64, 80)
        self.conv2d_4a_3x3 = Convolution(80, 192, 3, valid=True)
        self.mixed_5b = BlockA(192, 32)
        self.mixed_5c = BlockA(256, 64)
        self.mixed_5d = BlockA(288, 64)
        self.mixed_6a = BlockB(288)
        self.mixed_6b = BlockC(128)
        self.mixed_6c = BlockC(160)
        self.mixed_6d = BlockC(160)
        self.mixed_6e = BlockC(192)
        self.mixed_7a = BlockD()
        self.mixed_7b = BlockE(1280, max_pool=False)
        self.mixed_7c = BlockE(2048, max_pool=True)
        self.fc = nnx.Linear(POOL_FEATURES, NUM_LOGITS, use_bias=False, precision=PRECISION, rngs=nnx.Rngs(0))

    def __call__(self, images: jax.Array, resize: str = "tf1") -> InceptionFeatures:
        """Features of images (N,H,W,3) with values 0..255, uint8 or float32; `resize` is one of `RESIZES`."""
        x = resized(images, resize)  # (N,299,299,3)
        x = nnx.relu(self.conv2d_1a_3x3(x))  # (N,149,149,32)
        x = nnx.relu(self.conv2d_2a_3x3(x))  # (N,147,147,32)
        x = nnx.relu(_max_pool(self.conv2d_2b_3x3(x)))  # (N,73,73,64)
        x = nnx.relu(self.conv2d_3b_1x1(x))  # (N,73,73,80)
        x = nnx.relu(_max_pool(self.conv2d_4a_3x3(x)))  # (N,35,35,192)
        x = self.mixed_5d(self.mixed_5c(self.mixed_5b(x)))  # (N,35,35,288)
        x = self.mixed_6a(x)  # (N,17,17,768)
        x, _ = self.mixed_6b(x)
        x, _ = self.mixed_6c(x)
        x, mixed_6_conv = self.mixed_6d(x)
        x, _ = self.mixed_6e(x)
        x = self.mixed_7c(self.mixed_7b(self.mixed_7a(x)))  # (N,8,8,2048)
        pool = x.mean(axis=(1, 2))  # (N,2048)
        spatial = mixed_6_conv[..., :SPATIAL_CHANNELS].reshape(x.shape[0], SPATIAL_FEATURES)
        return InceptionFeatures(pool=pool, logits=self.fc(pool), spatial=spatial)
