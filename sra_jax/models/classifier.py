"""A small convolutional classifier whose last hidden layer serves as features for small data sets."""

import jax
import jax.numpy as jnp
from flax import nnx

FEATURES = 128
LARGEST_SIDE = 64


class Classifier(nnx.Module):
    """uint8 images (N,H,W,C) -> features (N,128) and logits (N,K), float32.

    A 3x3 convolution, then 3x3 convolutions of stride 2 until the map is at most 7 pixels wide, then two linear layers.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs):
        height, width, inputs = image_shape
        self.depth = 0
        outputs, stride = 32, 1
        while self.depth == 0 or max(height, width) > 7:
            # Numbered attributes rather than a list: parameter files have names, not positions.
            convolution = nnx.Conv(inputs, outputs, (3, 3), strides=stride, rngs=rngs)
            setattr(self, f"convolution_{self.depth}", convolution)
            height, width, inputs = -(-height // stride), -(-width // stride), outputs
            outputs, stride = 64, 2
            self.depth += 1
        self.hidden = nnx.Linear(height * width * inputs, FEATURES, rngs=rngs)
        self.logits = nnx.Linear(FEATURES, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images.astype(jnp.float32) / 127.5 - 1
        for index in range(self.depth):
            x = nnx.relu(getattr(self, f"convolution_{index}")(x))
        features = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return features, self.logits(features)
