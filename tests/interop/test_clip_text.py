import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sra_jax.errors import UserError
from sra_jax.interop import clip_text as interop
from sra_jax.models.clip_text import ClipText, ClipTextConfig

MERGES = [("t", "h"), ("th", "e</w>"), ("o", "n"), ("on", "e</w>")]
CONFIG = ClipTextConfig(
    vocab_size=518, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    max_position_embeddings=9, hidden_act="gelu",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text encoder of random numbers, as Hugging Face lays it out."""
    _, shapes = interop.abstract_params(CONFIG)
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda x: generator.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("clip") / "tower"
    interop.save(path, CONFIG, params, interop.make_tokenizer(interop.vocabulary_of(MERGES), MERGES))
    return path, params


def test_a_saved_tower_is_read_back(folder):
    path, params = folder
    tower = interop.load(str(path))
    assert tower.config == CONFIG
    assert tower.tokenizer.length == 9
    jax.tree.map(np.testing.assert_array_equal, tower.params, params)
    assert interop.load(str(path), length=5).tokenizer.length == 5
    with pytest.raises(UserError, match="exists already"):
        interop.save(path, CONFIG, params, interop.make_tokenizer(interop.vocabulary_of(MERGES), MERGES))


def test_ids_end_and_cut(folder):
    tokenizer = interop.load(str(folder[0]), length=5).tokenizer
    ids, ends, cut = tokenizer(["", "The  ONE", "one the one the", "x"])
    begin, end = 516, 517
    the, one = 513, 515
    x = sorted(chr(c) for c in range(33, 127)).index("x") + 256
    np.testing.assert_array_equal(ids, [
        [begin, end, end, end, end], [begin, the, one, end, end], [begin, one, the, one, end], [begin, x, end, end, end]
    ])  # fmt: skip
    np.testing.assert_array_equal(ends, [1, 3, 4, 2])
    np.testing.assert_array_equal(cut, [False, False, True, False])


def test_positions_see_what_is_before_them(folder):
    _, params = folder
    model = nnx.merge(interop.abstract_params(CONFIG)[0], jax.tree.map(jnp.asarray, params))
    ids = np.array([[516, 513, 515, 517, 517]])
    run = jax.jit(lambda ids: model(ids, taps=(1, 3)))
    whole, (first, last) = run(ids)
    for place in range(1, 5):
        changed = ids.copy()
        changed[0, place] = 7
        found, _ = run(changed)
        np.testing.assert_array_equal(found[:, :place], whole[:, :place])
        assert np.abs(found[:, place:] - whole[:, place:]).min(axis=-1).max() > 0
    np.testing.assert_allclose(model.norm(last), whole, atol=1e-5)
    assert not np.array_equal(first, last)
    with pytest.raises(ValueError, match="9 positions"):
        model(np.zeros((1, 10), np.int32))


def test_new_towers_have_the_same_shapes():
    fresh = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: ClipText(CONFIG, rngs=nnx.Rngs(0))))[1])
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, interop.abstract_params(CONFIG)[1])


def test_the_config_of_a_whole_clip():
    text = {key: value for key, value in dataclasses.asdict(CONFIG).items() if key != "dtype"}
    whole = json.dumps({"model_type": "clip", "vision_config": {}, "text_config": text})
    assert interop.config_from_json(whole, "x") == CONFIG
    assert interop.config_from_json(interop.config_to_json(CONFIG), "x") == CONFIG
    assert interop.config_from_json('{"model_type": "clip_text_model"}', "x") == ClipTextConfig()


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not JSON"), ('{"model_type": "t5"}', "not the config.json of a CLIP"),
    ('{"hidden_act": "relu"}', "hidden_act='relu' is not supported, only quick_gelu, gelu"),
    ('{"num_attention_heads": 7}', "num_attention_heads=7 does not divide hidden_size=512"),
])  # fmt: skip
def test_configs_that_do_not_fit(text, message):
    with pytest.raises(UserError, match=message):
        interop.config_from_json(text, "c.json")


def test_weights_that_do_not_fit(folder):
    _, params = folder
    tensors = interop.tensors_from_params(params)
    tensors["encoder.layers.0.mlp.fc1.bias"] = np.zeros(3, np.float32)
    tensors["surplus"] = tensors.pop("final_layer_norm.bias")
    with pytest.raises(UserError) as caught:
        interop.params_from_tensors(tensors, CONFIG, "w.safetensors")
    for part in ("missing final_layer_norm.bias", "mlp.fc1.bias has shape (3,), config.json asks for (24,)",
                 "unknown surplus"):  # fmt: skip
        assert part in str(caught.value)


def test_folders_that_lack_something(folder, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        interop.load(str(tmp_path))
    with pytest.raises(UserError, match="from 2 to 9"):
        interop.load(str(folder[0]), length=10)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer of .* cannot be read"):
        interop.load_tokenizer(str(tmp_path), 4)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(UserError, match="no pair of pieces"):
        interop.load_tokenizer(str(tmp_path), 4)
