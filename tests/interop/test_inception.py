import collections
import os
import pickle
import zipfile

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sra_jax.errors import UserError
from sra_jax.interop import inception
from sra_jax.interop.safetensors_tree import checksum, read_safetensors, write_safetensors
from sra_jax.interop.torch_file import read_torch_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SRA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_random_parameters_are_the_same_everywhere():
    parameters = inception.random_parameters()
    assert checksum(parameters) == "88d2b9c0a3189e45"
    assert checksum(inception.random_parameters(seed=1)) != checksum(parameters)
    kernel = parameters["mixed_7b"]["branch3x3dbl_2"]["kernel"]
    np.testing.assert_allclose(kernel.mean(axis=(0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(kernel.var() * np.prod(kernel.shape[:3]), 1 / 0.34, rtol=0.01)


def test_the_network_has_the_published_number_of_parameters():
    # Inception-v3 without its auxiliary head has 23,834,568 parameters: two batch-norm vectors a convolution, of which
    # one remains as its bias, and a classifier of 1000 classes with a bias in place of 1008 without.
    leaves = flatten_dict(inception.abstract_parameters()).values()
    kernels = sum(int(np.prod(leaf.shape)) for leaf in leaves if len(leaf.shape) > 1)
    biases = sum(leaf.shape[0] for leaf in leaves if len(leaf.shape) == 1)
    assert (kernels, biases) == (23_834_568 - 2 * 17_216 - 2049 * 1000 + 2048 * 1008, 17_216)


def test_safetensors_round_trip(tmp_path):
    tree = {
        "a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "c": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    }
    write_safetensors(tmp_path / "new" / "x.safetensors", tree, {"source": "here"})
    loaded, metadata = read_safetensors(tmp_path / "new" / "x.safetensors")
    assert checksum(loaded) == checksum(tree)
    assert metadata == {"source": "here"}
    assert os.listdir(tmp_path / "new") == ["x.safetensors"]


def test_weights_of_another_network_are_refused(tmp_path):
    write_safetensors(tmp_path / "other.safetensors", {"a": np.ones(2, np.float32)}, {})
    with pytest.raises(UserError, match="does not hold converted Inception weights"):
        inception.load_weights(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not weights of the FID Inception"):
        inception.convert_state_dict({"conv1.weight": np.zeros((2, 2))})


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(100, np.float32)}, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        inception.load_weights(path)


def test_missing_weights_say_where_they_are(tmp_path):
    with pytest.raises(UserError, match=r"do not exist.*https://github\.com/toshas/torch-fidelity/releases"):
        inception.load_weights(tmp_path / "no.pth")


def test_failed_download_leaves_nothing_behind(monkeypatch, cache):
    # A proxy that nobody listens at stands for a machine without a network.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no download.*Download https://.*--weights="):
        inception.load_weights()
    assert os.listdir(cache) == []


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_checkpoints_cannot_run_code(tmp_path, monkeypatch, format):
    monkeypatch.chdir(tmp_path)
    state_dict = collections.OrderedDict(weight=Attack())
    if format == "zip":
        with zipfile.ZipFile("x.pth", "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps(state_dict, protocol=2))
    else:
        with open("x.pth", "wb") as file:
            for part in (0x1950A86A20F9469CFC6C, 1001, {}, state_dict):
                pickle.dump(part, file, protocol=2)
    with pytest.raises(UserError, match=r"mkdir.*neither a tensor nor a dictionary"):
        read_torch_file("x.pth")
    assert not os.path.exists("attacked")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut", pickle.dumps(3)])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint"):
        read_torch_file(tmp_path / "x.pth")
