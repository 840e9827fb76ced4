"""What a method's loss does to the velocity that a network learns, taken back while sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.diffusion.process import Denoiser


@dataclasses.dataclass(frozen=True)
class LatentMeans:
    """Means over the training set, as far as a method asks for them.

    Attributes:
      mean: of all latents (H,W,C) float32.
      class_means: of each class's (K,H,W,C), zeros where there are none; None where nothing asks for them.
      class_shares: of the examples, each class's (K,); None as above.
    """

    mean: np.ndarray
    class_means: np.ndarray | None = None
    class_shares: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Correction:
    """u = (1 - w_y) v + w_y s_y, for a network that learned v = (u - w_y s_y) / (1 - w_y) where u was meant.

    Attributes:
      weight: w of each label (K + 1,), the null label's last; in [0, 1).
      velocity: s of each label (K + 1,H,W,C), or one for all (1,H,W,C).
    """

    weight: np.ndarray
    velocity: np.ndarray

    def correct(self, denoise: Denoiser) -> Denoiser:
        """`denoise` with the correction. Guidance goes around it: each of its branches has its own label."""
        weights, velocities = jnp.asarray(self.weight, jnp.float32), jnp.asarray(self.velocity, jnp.float32)

        def corrected(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
            weight = weights[y][:, None, None, None]
            return (1 - weight) * denoise(x, t, y) + weight * velocities[y if len(self.velocity) > 1 else 0 * y]

        return corrected
