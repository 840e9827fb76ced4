import functools
import http.server
import json
import shutil
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sra_jax.errors import UserError
from sra_jax.interop import autoencoder as interop
from sra_jax.models.autoencoder import AutoencoderConfig, abstract_model


@pytest.fixture(scope="module")
def tensors(tiny_vae):
    return load_file(tiny_vae.folder / interop.WEIGHTS_FILE)


def params_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_saved_folder_loads_as_it_was(tiny_vae, tensors):
    loaded = interop.load(str(tiny_vae.folder))
    assert loaded.config == tiny_vae.config
    assert len(loaded.fingerprint) == 64
    params_equal(interop.params_from_tensors(tensors, tiny_vae.config, "test"), tiny_vae.params)
    with pytest.raises(UserError, match="exists already"):
        interop.save(tiny_vae.folder, tiny_vae.config, tiny_vae.params)


def test_names_and_layout_are_diffusers(tensors):
    assert tensors["encoder.down_blocks.1.resnets.0.conv1.weight"].shape == (16, 8, 3, 3)
    assert tensors["encoder.down_blocks.0.downsamplers.0.conv.bias"].shape == (8,)
    assert tensors["decoder.up_blocks.1.resnets.0.conv_shortcut.weight"].shape == (8, 16, 1, 1)
    assert tensors["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (16, 16)
    assert tensors["quant_conv.weight"].shape == (8, 8, 1, 1)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_older_names_of_the_attention(tiny_vae, tensors, as_convolution):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in tensors.items():
        for new, old in older.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(new, old)
                array = array[..., None, None] if as_convolution and array.ndim == 2 else array
        renamed[name] = array
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    params_equal(interop.params_from_tensors(renamed, tiny_vae.config, "test"), tiny_vae.params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_weights(tiny_vae, tensors, tmp_path, dtype):
    shutil.copy(tiny_vae.folder / interop.CONFIG_FILE, tmp_path)
    save_file({name: array.astype(dtype) for name, array in tensors.items()}, tmp_path / interop.WEIGHTS_FILE)
    loaded = interop.load(str(tmp_path)).params(jax.numpy.zeros(1))
    params_equal(loaded, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), tiny_vae.params))


def test_autoencoders_without_optional_parts():
    config = AutoencoderConfig(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, mid_block_add_attention=False, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    assert interop.config_from_json(interop.config_to_json(config), "test") == config
    _, shapes = abstract_model(config)
    assert not {"quant_conv", "post_quant_conv"} & shapes.keys()
    assert "attention" not in shapes["encoder"]["mid"]


def test_tensors_that_do_not_fit_are_all_named(tiny_vae, tensors):
    changed = dict(tensors)
    del changed["quant_conv.bias"]
    changed["encoder.conv_in.weight"] = changed["encoder.conv_in.weight"][:4]
    changed["encoder.extra"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        interop.params_from_tensors(changed, tiny_vae.config, "here")
    for part in ("missing quant_conv.bias", "unknown encoder.extra", "(4, 3, 3, 3), config.json asks for (8, 3, 3, 3)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn='relu' is not supported"),
        ({"_class_name": "VQModel"}, "_class_name='VQModel' is not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"norm_num_groups": 3}, "norm_num_groups=3 does not divide"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0 must be above 0"),
    ],
)
def test_configs_that_are_not_supported(tiny_vae, change, message):
    values = json.loads(interop.config_to_json(tiny_vae.config)) | change
    with pytest.raises(UserError, match=message):
        interop.config_from_json(json.dumps(values), "config.json")


def test_files_that_are_missing_or_cut(tiny_vae, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json: download"):
        interop.load(str(tmp_path))
    shutil.copy(tiny_vae.folder / interop.CONFIG_FILE, tmp_path)
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors: download"):
        interop.load(str(tmp_path))
    whole = (tiny_vae.folder / interop.WEIGHTS_FILE).read_bytes()
    (tmp_path / interop.WEIGHTS_FILE).write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        interop.load(str(tmp_path))
    with pytest.raises(UserError, match="give a folder that exists or a Hugging Face id"):
        interop.load(str(tmp_path / "absent"))


@pytest.fixture
def hub(tiny_vae, tmp_path, monkeypatch):
    """A local server that has the tiny VAE as `someone/vae`, and an empty cache."""
    served = tmp_path / "hub" / "someone" / "vae" / "resolve" / "main"
    shutil.copytree(tiny_vae.folder, served)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield served
    server.shutdown()


def test_hugging_face_ids_are_fetched_once(hub, tiny_vae):
    loaded = interop.load("someone/vae")
    assert loaded.config == tiny_vae.config
    assert loaded.fingerprint == interop.load(str(tiny_vae.folder)).fingerprint
    shutil.rmtree(hub)
    assert interop.load("someone/vae").fingerprint == loaded.fingerprint
    assert interop.read_config("someone/vae") == tiny_vae.config


def test_what_cannot_be_fetched(hub, tmp_path):
    with pytest.raises(UserError, match=r"(?s)someone/other.*404.*on a machine with a network"):
        interop.load("someone/other")
    (hub / interop.WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match="cannot be fetched"):
        interop.load("someone/vae")
    assert not list((tmp_path / "cache").rglob("*.safetensors*"))


def test_sizes_of_the_default_are_known_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert interop.read_config(interop.DEFAULT_VAE) == AutoencoderConfig()
