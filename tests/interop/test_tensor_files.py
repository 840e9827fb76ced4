"""Reading safetensors files; .pt files are in tests/parity, for they need PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sra_jax.errors import UserError
from sra_jax.interop.tensor_files import open_tensor_file


def test_values_wrappers_and_types(tmp_path):
    path = tmp_path / "weights.safetensors"
    values = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    save_file({"module.a": values, "_orig_mod.b": values.astype(np.float16), "c": values.astype(jnp.bfloat16)}, path)
    file = open_tensor_file(path)
    assert file.shapes == {"a": (2, 3), "b": (2, 3), "c": (2, 3)}
    a, b, c = file.read("params", ["a", "b", "c"])
    assert {x.dtype for x in (a, b, c)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(a, values)
    np.testing.assert_array_equal(b, values.astype(np.float16))
    np.testing.assert_array_equal(c, values.astype(jnp.bfloat16))


def test_integers_are_no_weights(tmp_path):
    save_file({"a": np.arange(3)}, tmp_path / "a.safetensors")
    file = open_tensor_file(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="tensor a is int64"):
        file.read("params", ["a"])


def test_files_that_are_none(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file({"a": np.zeros(1000, np.float32)}, whole)
    cut, text, other = tmp_path / "cut.safetensors", tmp_path / "text.safetensors", tmp_path / "weights.onnx"
    cut.write_bytes(whole.read_bytes()[:2000])
    text.write_text("not tensors")
    other.write_bytes(b"")
    for path in (cut, text):
        with pytest.raises(UserError, match="not a whole safetensors file"):
            open_tensor_file(path)
    with pytest.raises(UserError, match=r"unknown suffix '\.onnx'; allowed"):
        open_tensor_file(other)
    with pytest.raises(UserError, match="is not a file"):
        open_tensor_file(tmp_path / "missing.pt")


@pytest.mark.faults
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "net.", "_orig_mod.module.", "module._orig_mod.", "model.net._orig_mod."]
)
def test_wrappers_of_training_frameworks_in_any_order(prefix, tmp_path):
    tensors = {"pos_embed": np.ones((2, 3), np.float32), "blocks.0.attn.qkv.weight": np.zeros(4, np.float32)}
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    file = open_tensor_file(tmp_path / "a.safetensors")
    assert file.groups == ("params",)
    assert file.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    for name, found in zip(tensors, file.read("params", list(tensors)), strict=True):
        np.testing.assert_array_equal(found, tensors[name])


@pytest.mark.faults
def test_an_ema_beside_its_model(tmp_path):
    path = tmp_path / "a.safetensors"
    one, two = np.ones(3, np.float32), np.full(3, 2, np.float32)
    save_file({"ema_model.module.a": two, "model.a": one}, path)
    file = open_tensor_file(path)
    assert file.groups == ("params", "ema")
    np.testing.assert_array_equal(file.read("params", ["a"])[0], one)
    np.testing.assert_array_equal(file.read("ema", ["a"])[0], two)
    save_file({"ema_model.a": two}, path)
    assert open_tensor_file(path).groups == ("ema",)
    save_file({"ema_model.a": two, "model.b": one}, path)
    with pytest.raises(UserError, match=r"its params and its ema differ in (a, b|b, a)$"):
        open_tensor_file(path)
    save_file({"net.a": two, "model.a": one}, path)
    with pytest.raises(UserError, match=r"holds a twice, as (net|model)\.a and as (net|model)\.a"):
        open_tensor_file(path)
