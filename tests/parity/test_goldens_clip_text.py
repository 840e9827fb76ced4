"""The text tower and its tokenizer equal Hugging Face's. The goldens' README.t2i.md explains every array."""

import gzip
import hashlib
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sra_jax.interop import clip_text as interop
from sra_jax.models.clip_text import ClipText
from tests.parity.test_goldens_mmdit_forward import close, state_dict

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES = 49152 - 256 - 2


@pytest.fixture(scope="module")
def tower(golden):
    """The arrays, the file's settings, the tower."""
    arrays = golden("clip_text")
    meta = json.loads(str(arrays["meta/config"]))
    config = interop.config_from_json(json.dumps(meta), "meta/config")
    params = interop.params_from_tensors(state_dict(arrays), config, "sd/")
    return arrays, meta, nnx.merge(interop.abstract_params(config)[0], jax.tree.map(jnp.asarray, params)), params


def hidden_states(tower: ClipText, ids, end):
    numbers = tuple(range(1, tower.config.num_hidden_layers + 1))
    last, features = jax.jit(lambda ids: tower(ids, taps=numbers))(jnp.asarray(ids))
    # a 2 in the configs of old models: transformers then takes the largest id
    first_end = np.argmax(ids if end == 2 else ids == end, axis=1)
    return {
        "last_hidden_state": last, "pooler_output": last[np.arange(len(ids)), first_end],
        "embeddings": tower.embed(ids),
        **{f"layer_{number}": x for number, x in zip(numbers, features, strict=True)},
    }  # fmt: skip


def test_clip_text_hidden_states(tower):
    """Every group of outputs, from the ids that belong to it."""
    arrays, meta, model, _ = tower
    groups = {"out": "in/ids"}
    present = {key.split("/")[0] for key in arrays} - {"meta", "sd", "in", "eps", "toy_bpe", "bpe"}
    assert present
    for group in present:
        found = hidden_states(model, arrays[groups.get(group, f"in/ids_{group}")], meta["eos_token_id"])
        for name, expected in state_dict(arrays, f"{group}/").items():
            close(found[name], expected, f"{group}/{name}")


def test_clip_text_layer_norm_epsilon(tower):
    """Hidden states of tiny variance, where the norms' epsilon decides."""
    arrays, _, model, _ = tower
    eps = state_dict(arrays, "eps/")
    if not eps:
        pytest.skip("this set has no probe")
    x = jnp.asarray(eps.pop("x_small"))
    graphdef, layers = nnx.split(model.layers)
    assert eps
    for name, expected in eps.items():
        number = re.fullmatch(r"layer_(\d+)", name)
        layer = nnx.merge(graphdef, jax.tree.map(lambda p: p[int(number[1]) - 1], layers)) if number else model.norm  # noqa: B023
        close(layer(x), expected, name)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_text_names_round_trip(tower, prefix):
    """The names of a tower alone, and those of a whole CLIP with its other parts."""
    arrays, _, model, params = tower
    tensors = interop.tensors_from_params(params)
    expected = state_dict(arrays)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    whole = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    whole |= {f"{prefix}embeddings.position_ids": np.arange(3)[None], "logit_scale": np.ones(()),
              "vision_model.embeddings.class_embedding": np.ones(3)}  # fmt: skip
    again = interop.params_from_tensors(whole, model.config, "the test")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_clip_text_toy_tokenizer(golden, tmp_path):
    """A small vocabulary: from its own files, in both of their forms."""
    arrays = golden("clip_text")
    toy = state_dict(arrays, "toy_bpe/")
    if not toy:
        pytest.skip("this set has no toy vocabulary")
    (tmp_path / "vocab.json").write_text(str(toy["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + str(toy["merges"]))
    length = toy["ids"].shape[1]
    texts = [str(text) for text in toy["texts"]]
    np.testing.assert_array_equal(interop.load_tokenizer(str(tmp_path), length)(texts)[0], toy["ids"])
    tokenizer = interop.make_tokenizer(json.loads(str(toy["vocab"])), interop.parse_merges(str(toy["merges"])))
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    np.testing.assert_array_equal(interop.load_tokenizer(str(tmp_path), length)(texts)[0], toy["ids"])


def test_clip_text_published_tokenizer(golden):
    """CLIP's own vocabulary, which the wheel of open_clip_torch ships."""
    arrays = golden("clip_text")
    spec = importlib.util.find_spec("open_clip")
    if spec is None or "bpe/ids" not in arrays:
        pytest.skip("needs CLIP's merges: pip install --no-deps open_clip_torch")
    content = (Path(spec.submodule_search_locations[0]) / MERGES_FILE).read_bytes()
    assert hashlib.sha256(content).hexdigest() == MERGES_SHA256
    lines = gzip.decompress(content).decode().splitlines()[1 : 1 + MERGES]
    merges = interop.parse_merges("\n".join(lines))
    expected = arrays["bpe/ids"]
    tokenizer = interop.ClipTokenizer(
        interop.make_tokenizer(interop.vocabulary_of(merges), merges), expected.shape[1]
    )  # fmt: skip
    ids, _, _ = tokenizer([str(text) for text in arrays["bpe/texts"]])
    np.testing.assert_array_equal(ids, expected)
    if "bpe/equals_openai" in arrays:
        np.testing.assert_array_equal((ids == arrays["bpe/ids_openai"]).all(axis=1), arrays["bpe/equals_openai"])
