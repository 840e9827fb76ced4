"""Metrics against numbers of ADM's evaluation suite (guided-diffusion, evaluations/evaluator.py)."""

import numpy as np
import pytest

from sra_jax.evaluation.frechet import frechet_distance
from sra_jax.evaluation.inception_score import inception_score
from sra_jax.evaluation.precision_recall import precision_recall
from sra_jax.evaluation.statistics import GaussianStatistics, Moments
from sra_jax.models.inception import resize_bilinear_tf1
from tests.parity.stored import require


def moments_in_batches(features, batch=37):
    moments = Moments()
    for start in range(0, len(features), batch):
        moments.update(features[start : start + batch])
    return moments.statistics()


@pytest.mark.parametrize("kind", ["pool", "spatial"])
@pytest.mark.parametrize("side", ["real", "fake"])
def test_metrics_statistics(golden, kind, side):
    arrays = golden("metrics")
    require(arrays, f"{kind}/mu_{side}", f"{kind}/sigma_{side}")
    statistics = moments_in_batches(arrays[f"{kind}/{side}"])
    scale = np.abs(arrays[f"{kind}/mu_{side}"]).max()
    np.testing.assert_allclose(statistics.mean, arrays[f"{kind}/mu_{side}"], atol=1e-6 * scale, rtol=0)
    scale = np.abs(arrays[f"{kind}/sigma_{side}"]).max()
    np.testing.assert_allclose(statistics.covariance, arrays[f"{kind}/sigma_{side}"], atol=1e-9 * scale, rtol=0)


@pytest.mark.parametrize("kind", ["pool", "spatial", "small"])
def test_metrics_fid(golden, kind):
    arrays = golden("metrics")
    require(arrays, f"{kind}/fid")
    distance = frechet_distance(moments_in_batches(arrays[f"{kind}/real"]), moments_in_batches(arrays[f"{kind}/fake"]))
    np.testing.assert_allclose(distance, arrays[f"{kind}/fid"], rtol=1e-6)
    np.testing.assert_allclose(distance, arrays[f"{kind}/fid_eigh"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["pool", "spatial"])
def test_metrics_fid_of_stored_statistics(golden, kind):
    arrays = golden("metrics")
    require(arrays, f"{kind}/fid", f"{kind}/sigma_real")
    real, fake = (
        GaussianStatistics(arrays[f"{kind}/mu_{side}"], arrays[f"{kind}/sigma_{side}"]) for side in ("real", "fake")
    )
    np.testing.assert_allclose(frechet_distance(real, fake), arrays[f"{kind}/fid"], rtol=1e-6)


def test_metrics_inception_score(golden):
    arrays = golden("metrics")
    logits = arrays["is/acts"] @ arrays["is/W"]
    np.testing.assert_allclose(inception_score(logits, int(arrays["is/split_size"])), arrays["is/score"], rtol=1e-6)
    np.testing.assert_allclose(inception_score(logits), arrays["is/score_single_split"], rtol=1e-6)


@pytest.mark.parametrize("block", [64, 4096])
@pytest.mark.parametrize("run", ["fp32", "fp32_offset"])
def test_metrics_precision_recall(golden, run, block):
    arrays = golden("metrics")
    require(arrays, f"pr/{run}/precision")
    offset = arrays["pr/offset"] if run.endswith("offset") else np.float32(0)
    result = precision_recall(arrays["pool/fake"] + offset, arrays["pool/real"] + offset, block=block)
    np.testing.assert_array_equal(result.samples_covered, arrays[f"pr/{run}/fake_covered"])
    np.testing.assert_array_equal(result.reference_covered, arrays[f"pr/{run}/real_covered"])
    np.testing.assert_allclose(result.precision, arrays[f"pr/{run}/precision"], rtol=1e-6)
    np.testing.assert_allclose(result.recall, arrays[f"pr/{run}/recall"], rtol=1e-6)
    # With an offset the stored radii carry the cancellation of the squared norms; see the flags for what matters.
    squared_norm = (np.square(arrays["pool/real"] + offset)).sum(1).max()
    noise = 1e-6 * squared_norm
    np.testing.assert_allclose(result.reference_radii, arrays[f"pr/{run}/radii_real"].ravel(), atol=noise, rtol=1e-5)
    np.testing.assert_allclose(result.samples_radii, arrays[f"pr/{run}/radii_fake"].ravel(), atol=noise, rtol=1e-5)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_metrics_resize(golden, direction):
    arrays = golden("metrics")
    require(arrays, f"resize/{direction}_out")
    expected = arrays[f"resize/{direction}_out"].transpose(0, 2, 3, 1)
    resized = resize_bilinear_tf1(arrays[f"resize/{direction}_in"].transpose(0, 2, 3, 1), expected.shape[1:3])
    np.testing.assert_allclose(resized, expected, atol=1e-4, rtol=0)
    if f"resize/{direction}_scaled" in arrays:
        scaled = arrays[f"resize/{direction}_scaled"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose((np.asarray(resized) - 128) / 128, scaled, atol=1e-6, rtol=0)
