"""An extractor that costs nothing: features are random projections of the pixels."""

import jax.numpy as jnp
import numpy as np

from sra_jax.evaluation.features import Extractor


def toy_extractor(identity="toy/1", *, published=False, predicts_labels=False, spoilt=False):
    weights = np.random.default_rng(1).standard_normal((4, 4 * 4, 12)).astype(np.float32)
    if spoilt:
        weights[0, 0, 0] = np.nan

    def apply(weights, images):
        pixels = images.astype(jnp.float32).mean(-1).reshape(len(images), -1) / 255
        pool, spatial, logits, _ = (jnp.tanh(pixels @ w) for w in weights)
        return {"pool": pool, "spatial": spatial, "logits": logits[:, :3]}

    return Extractor(
        name=identity.split("/")[0],
        identity=identity,
        outputs=frozenset({"pool", "logits", "spatial"}),
        apply=apply,
        parameters=weights,
        published=published,
        predicts_labels=predicts_labels,
    )


def toy_images(count, seed=0, shape=(4, 4, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
