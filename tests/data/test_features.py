"""Features of external encoders beside latents: stored, checked, read with them."""

import json
import pickle

import numpy as np
import pytest

from configs import sit_b2
from sra_jax import config as config_lib
from sra_jax.data import features, latents, registry
from sra_jax.data.moments import MomentsFolder
from sra_jax.data.preparation import MomentsCopier, prepare
from sra_jax.errors import UserError

EXAMPLES, SIDE, TOKENS = 7, 4, 4


@pytest.fixture
def folder(tiny_vae, tmp_path):
    """Latents of seven examples in three shards."""
    source = tmp_path / "moments"
    source.mkdir()
    generator = np.random.default_rng(0)
    for i in range(EXAMPLES):
        np.save(source / f"{i}.npy", np.exp(generator.normal(size=(8, SIDE, SIDE))).astype(np.float32))
    (source / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.npy", i % 3] for i in range(EXAMPLES)]}))
    moments = MomentsFolder(str(source))
    prepare(
        moments, MomentsCopier(moments, tiny_vae.config), str(tmp_path / "latents"), source_name="edm2:moments",
        vae_name=str(tiny_vae.folder), vae_fingerprint=None, vae_config=tiny_vae.config, dtype="float32",
        batch_size=2, shard_size=3, workers=1,
    )  # fmt: skip
    return tmp_path / "latents"


def arrays(path, width, tokens=TOKENS, count=EXAMPLES, seed=0):
    path.mkdir(parents=True)
    values = np.random.default_rng(seed).normal(size=(count, tokens, width)).astype(np.float32)
    for i, value in enumerate(values):
        np.save(path / f"{i:03d}.npy", value)
    return values


def recipe(folder, widths, name="repa"):
    config = sit_b2.get_config(name)
    with config.unlocked():
        config.data.update(path=str(folder), image_size=SIDE, channels=4, num_classes=3)
        config.method[name].widths = widths
    return config


def test_two_encoders_are_read_side_by_side_with_their_latents(folder, tmp_path):
    one, other = arrays(tmp_path / "one", 5), arrays(tmp_path / "other", 3, seed=1)
    np.save(tmp_path / "other.npy", other)
    stored = features.store(folder, [str(tmp_path / "one"), str(tmp_path / "other.npy")])
    assert (stored.tokens, stored.widths, len(stored.shards)) == (TOKENS, (5, 3), 3)
    config = recipe(folder, (5, 3))
    source = pickle.loads(pickle.dumps(registry.training_set(config).source))
    plain = latents.load(config.data).source
    expected = np.concatenate([one, other], axis=2).astype(np.float16)
    order = [6, 0, 3, 3, 2]
    batch = source.read_batch(order)
    np.testing.assert_array_equal(batch["features"], expected[order])
    np.testing.assert_array_equal(batch["mean"], plain.read_batch(order)["mean"])
    np.testing.assert_array_equal(source[4]["features"], expected[4])
    assert source[4]["label"] == plain[4]["label"]
    # a method that needs none reads none
    baseline = sit_b2.get_config("none")
    with baseline.unlocked():
        baseline.data.update(config.data)
    assert registry.training_set(baseline).source[0].keys() == {"mean", "std", "label"}


def test_an_interrupted_attempt_goes_on(folder, tmp_path):
    values = arrays(tmp_path / "one", 5)
    np.save(tmp_path / "one" / "005.npy", np.full((TOKENS, 5), np.nan))
    with pytest.raises(UserError, match=r"005\.npy holds numbers that are not finite"):
        features.store(folder, [str(tmp_path / "one")])
    assert features.read(folder) is None
    first = sorted(folder.glob("features-*"))
    assert len(first) == 1  # the shard before the one with the damage
    written = first[0].stat().st_mtime_ns
    np.save(tmp_path / "one" / "005.npy", values[5])
    features.store(folder, [str(tmp_path / "one")])
    assert first[0].stat().st_mtime_ns == written
    read = registry.training_set(recipe(folder, (5,))).source.read_batch(range(EXAMPLES))["features"]
    np.testing.assert_array_equal(read, values.astype(np.float16))
    with pytest.raises(UserError, match="these latents have features"):
        features.store(folder, [str(tmp_path / "one")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 6}, "holds 6 arrays, and .* 7 examples"),
        ({"tokens": 5}, "5 vectors an example are no square grid"),
        ({"tokens": 9}, "9 vectors an example are no square grid of patches of 4x4 latents, such as 4"),
    ],
)
def test_arrays_that_do_not_fit(folder, tmp_path, options, message):
    arrays(tmp_path / "one", 5, **options)
    with pytest.raises(UserError, match=message):
        features.store(folder, [str(tmp_path / "one")])


def test_one_array_of_another_shape_or_kind(folder, tmp_path):
    arrays(tmp_path / "one", 5)
    for wrong, message in (
        (np.zeros((TOKENS, 6)), r"003\.npy has shape \(4, 6\), not \(4, 5\) as the first"),
        (np.full((TOKENS, 5), 1e6), "above 65504"),
        (np.full((TOKENS, 5), "a"), "not numbers"),
    ):
        np.save(tmp_path / "one" / "003.npy", wrong)
        with pytest.raises(UserError, match=message):
            features.store(folder, [str(tmp_path / "one")])
    (tmp_path / "one" / "003.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"003\.npy is not a \.npy file"):
        features.store(folder, [str(tmp_path / "one")])


def test_what_training_needs_is_checked_first(folder, tmp_path):
    with pytest.raises(UserError, match=r"does not hold: python tools/prepare_latents\.py --features"):
        registry.training_set(recipe(folder, (5,)))
    arrays(tmp_path / "one", 5)
    features.store(folder, [str(tmp_path / "one")])
    with pytest.raises(UserError, match=r"widths \(5,\).*the method's widths are \(6,\)"):
        registry.training_set(recipe(folder, (6,)))
    config = recipe(folder, (5,), "repa_conv")
    with config.unlocked():
        config.model.patch = 4
    with pytest.raises(UserError, match=r"4 tokens.*model\.patch=4 makes 1 tokens"):
        registry.training_set(config)
    shard = sorted(folder.glob("features-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="missing or damaged"):
        registry.training_set(recipe(folder, (5,)))


def test_other_sets_take_a_stand_in():
    config = sit_b2.get_config("smoke,repa")
    assert "features" not in registry.training_set(config).source[0]
    assert config_lib.methods_of(config).feature_widths == (64,)


def test_foreign_descriptions_are_refused(folder):
    (folder / features.FILE).write_text(json.dumps({"format": "another"}))
    with pytest.raises(UserError, match="does not describe stored features"):
        features.read(folder)
    shard = {"file": "../x", "examples": 7, "bytes": 1, "sha256": ""}
    values = {"format": features.FORMAT, "tokens": 4, "widths": [5], "sources": ["x"], "shards": [shard]}
    (folder / features.FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match="is no file of this folder"):
        features.read(folder)
