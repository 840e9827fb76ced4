"""The FID Inception network and the metrics against torch-fidelity, with one set of random weights, on real images."""

import json

import jax
import numpy as np
import pytest
import torch
import torch_fidelity
from flax import nnx
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sra_jax.evaluation.kid import kernel_distance
from sra_jax.interop.inception import convert_checkpoint, load_weights
from sra_jax.interop.torch_file import read_torch_file
from sra_jax.models.inception import Inception, resized
from tests.conftest import run


def photo_crops(size, count, start=0, pixels=128):
    """Crops of scikit-learn's two photographs, (count,size,size,3) uint8."""
    photos = load_sample_images().images
    crops = []
    for index in range(start, start + count):
        photo = photos[index % 2]
        top = (37 * index) % (photo.shape[0] - pixels)
        left = (61 * index) % (photo.shape[1] - pixels)
        crop = Image.fromarray(photo[top : top + pixels, left : left + pixels])
        crops.append(np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(crops)


def digit_images(size, count, start=0):
    """Handwritten digits scaled up, (count,size,size,3) uint8."""
    digits = np.round(load_digits().images[start : start + count] * 255 / 16).astype(np.uint8)
    scaled = [np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BILINEAR)) for digit in digits]
    return np.repeat(np.stack(scaled)[..., None], 3, axis=-1)


class Untrained(FeatureExtractorInceptionV3):
    """torch-fidelity's network before it has weights."""

    def load_state_dict(self, state_dict):
        return None


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint of random weights, calibrated: every batch norm's statistics are those of its own inputs.

    Without that, activations of a deep random network all but vanish, and agreement would mean little.
    """
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save({}, folder / "empty.pth")
    network = Untrained("random", ["2048", "logits_unbiased"], folder / "empty.pth")
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = None
            module.train()
    torch.nn.init.normal_(network.fc.weight, 0, 0.1)
    with torch.no_grad():
        network(torch.from_numpy(np.concatenate([photo_crops(96, 8), digit_images(96, 8)]).transpose(0, 3, 1, 2)))
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(scope="session")
def peer(checkpoint):
    """torch-fidelity's network: uint8 images (N,H,W,3) -> pool, logits, spatial as numpy arrays."""
    network = FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"], str(checkpoint))
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))

    def run(images):
        spatial.clear()
        with torch.no_grad():
            pool, logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        return pool.numpy(), logits.numpy(), spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1).numpy()

    return run


@pytest.fixture(scope="session")
def ours(checkpoint, tmp_path_factory):
    weights = convert_checkpoint(checkpoint, tmp_path_factory.mktemp("converted") / "inception.safetensors")
    graphdef, _ = nnx.split(nnx.eval_shape(Inception))
    run = jax.jit(lambda images: nnx.merge(graphdef, weights.parameters)(images))
    return lambda images: tuple(np.asarray(values) for values in run(images))


@pytest.mark.parametrize(
    "images",
    [
        photo_crops(256, 4),
        photo_crops(299, 2),
        photo_crops(64, 4),
        photo_crops(400, 2, pixels=300),
        digit_images(32, 4),
    ],
    ids=["photos256", "photos299", "photos64", "photos400", "digits32"],
)
def test_network(images, peer, ours):
    for name, expected, found in zip(("pool", "logits", "spatial"), peer(images), ours(images), strict=True):
        assert expected.std(axis=0).mean() > 0.01 * np.abs(expected).max(), f"{name} says nothing of the images"
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize(("before", "pixels"), [(256, None), (64, None), (300, 400)])
def test_pytorchs_resize(before, pixels):
    """As pytorch-fid and U-ViT's tools bring images to the network: [0, 1], interpolate, [-1, 1]."""
    images = photo_crops(before, 2) if pixels is None else photo_crops(pixels, 2, pixels=before)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 255, size=(299, 299), mode="bilinear",
        align_corners=False,
    )  # fmt: skip
    found = np.asarray(resized(images, "pytorch")).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, 2 * expected.numpy() - 1, atol=2e-5)
    assert np.abs(found - np.asarray(resized(images, "tf1")).transpose(0, 3, 1, 2)).max() > 0.01


def write_folder(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:04}.png")


@pytest.mark.parametrize("kind", ["photos", "digits"])
def test_end_to_end(kind, checkpoint, tmp_path):
    if kind == "photos":
        samples, reference = photo_crops(64, 60, start=60), photo_crops(64, 80, start=200, pixels=120)
    else:
        samples, reference = digit_images(32, 60, start=300), digit_images(32, 80)
    write_folder(tmp_path / "samples", samples)
    write_folder(tmp_path / "reference", reference)
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(tmp_path / "reference"),
        feature_extractor="inception-v3-compat",  # precision and recall take another network by default
        feature_extractor_weights_path=str(checkpoint),
        cuda=False,
        batch_size=20,
        isc=True,
        fid=True,
        prc=True,
        # All samples in one split: ADM's splits are longer than these sets.
        isc_splits=1,
        samples_shuffle=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes beside JAX's threads
        verbose=False,
    )
    finished = run(
        "tools/fid.py",
        f"--samples={tmp_path / 'samples'}",
        f"--reference={tmp_path / 'reference'}",
        f"--weights={checkpoint}",
        environment={"SRA_JAX_CACHE": str(tmp_path / "cache")},
    )
    result = json.loads(finished.stdout)
    assert result["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert result["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-3)
    assert result["precision"] == pytest.approx(expected["precision"], abs=1e-3)
    assert result["recall"] == pytest.approx(expected["recall"], abs=1e-3)
    assert 0 < result["precision"] < 1 or 0 < result["recall"] < 1
    assert result["inception_score"] > 1.05


def test_kid():
    generator = np.random.default_rng(0)
    first = generator.standard_normal((50, 16), dtype=np.float32)
    second = generator.standard_normal((50, 16), dtype=np.float32) + 0.5
    # One subset of everything: the random choice does not matter.
    expected = torch_fidelity.metric_kid.kid_features_to_metric(
        torch.from_numpy(first), torch.from_numpy(second), kid_subsets=1, kid_subset_size=50, verbose=False
    )
    found = kernel_distance(first, second, subsets=1)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoint_files_without_torch(tmp_path, zipped):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "view": base[1:3, 2:],
        "transposed": base.T,
        "parameter": torch.nn.Parameter(base[0]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "bool": base > 3,
    }
    saved = {"model": tensors, "step": 7, "buffers": torch.nn.BatchNorm2d(3).state_dict()}
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    loaded = read_torch_file(tmp_path / "x.pth")
    assert loaded["step"] == 7
    for name, tensor in (tensors | saved["buffers"]).items():
        found = (loaded["model"] | loaded["buffers"])[name]
        assert found.shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(found.astype(np.float64), tensor.detach().double().numpy(), err_msg=name)
        assert found.dtype.name == str(tensor.dtype).removeprefix("torch."), name


def test_converted_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("SRA_JAX_CACHE", str(tmp_path / "cache"))
    legacy = tmp_path / "legacy.pth"
    torch.save(torch.load(checkpoint), legacy, _use_new_zipfile_serialization=False)
    weights = load_weights(legacy)
    (converted,) = (tmp_path / "cache").iterdir()
    written = converted.stat().st_mtime_ns
    assert load_weights(legacy).checksum == weights.checksum == load_weights(converted).checksum
    assert converted.stat().st_mtime_ns == written
    assert not weights.published
    assert load_weights(checkpoint).checksum == weights.checksum
