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
