"""tools/linear_probe.py as a user runs it, and its parts against other implementations."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from sra_jax.data import registry as datasets
from sra_jax.diffusion.gaussian import GaussianDiffusion
from sra_jax.errors import UserError
from sra_jax.inspection.probe import Schedule, probe
from sra_jax.inspection.tokens import (
    FeatureSet,
    Settings,
    extract_to_disk,
    make_extractor,
    parse_blocks,
    parse_levels,
    times,
)
from sra_jax.runs.trained import TrainedModel
from tests.conftest import run

TOOL = "tools/linear_probe.py"


def test_two_names_in_one_figure(tiny_run, tmp_path):
    output = tmp_path / "probe"
    flags = (f"--workdir={tiny_run},{tiny_run},{tiny_run}", "--names=A,A,B", "--levels=0,0.5", "--epochs=3",
             f"--cache={tmp_path / 'cache'}", f"--output={output}")  # fmt: skip
    done = run(TOOL, *flags)
    assert "best" in done.stdout
    result = json.loads((output / "probe.json").read_text())
    assert (result["blocks"], result["levels"], result["condition"]) == ([1, 2, 3], [0.0, 0.5], "null")
    assert [(run["name"], run["weights"]) for run in result["runs"]] == [("A", "ema"), ("A", "ema"), ("B", "ema")]
    first, second, third = (np.array(run["accuracy"]) for run in result["runs"])
    assert first.shape == (2, 3)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)
    assert 0.1 < first.max() <= 1
    with (output / "probe.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 3
    assert float(rows[1]["accuracy"]) == pytest.approx(first[0, 1], abs=1e-6)
    assert Image.open(output / "probe.png").size[0] > 500
    assert len(list((tmp_path / "cache").iterdir())) == 2  # training and test features, shared by all three
    assert "exists" in run(TOOL, *flags, code=2).stderr


def test_wrong_input(tiny_run, tmp_path):
    output = f"--output={tmp_path / 'probe'}"
    done = run(TOOL, f"--workdir={tiny_run}", "--names=A,B", output, code=2)
    assert "2 names for 1 workdirs" in done.stderr
    done = run(TOOL, f"--workdir={tiny_run}", "--blocks=0,2", output, code=2)
    assert "--blocks=0,2: give ascending block numbers from 1 to 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "probe").exists()


def test_settings_that_no_network_has():
    for blocks, levels, message in (
        ((2, 1), (0.5,), "ascending block"),
        ((4,), (0.5,), "from 1 to 3"),
        ((1,), (0.5, 1.5), "between 0 \\(data\\) and 1 \\(noise\\)"),
        ((1,), (), "between 0"),
    ):
        with pytest.raises(UserError, match=message):
            Settings(blocks, levels).check(3)
    with pytest.raises(UserError, match="block numbers such as"):
        parse_blocks(["first"], 3)
    with pytest.raises(UserError, match="--levels=low"):
        parse_levels(["low"])
    assert parse_blocks(["all"], 3) == (1, 2, 3)


@pytest.fixture(scope="module")
def model(tiny_run):
    return TrainedModel(tiny_run)


def test_features_are_pooled_tokens_of_the_network(model):
    """Against the network called by hand at one level, null label and true label."""
    dataset = datasets.load(model.config.data)
    examples = [dataset.source[i] for i in range(8)]
    batch = {key: jnp.stack([example[key] for example in examples]) for key in examples[0]}
    indices = jnp.arange(8)
    for condition, labels in (("null", jnp.full(8, 10)), ("true", batch["label"])):
        settings = Settings((1, 3), (0.0, 0.3), condition)
        x_t, features = make_extractor(model, dataset, settings, pool=True)(model.params, batch, indices)
        assert features.shape == (8, 2, 2, 32)
        clean = dataset.encode(batch, None)
        np.testing.assert_allclose(x_t[:, 0], clean, atol=1e-6)
        noise = (x_t[:, 1] - 0.7 * clean) / 0.3
        assert abs(float(noise.mean())) < 0.2
        assert 0.8 < float(noise.std()) < 1.2
        _, tokens = model.networks.model(model.params)(x_t[:, 1], jnp.full(8, 0.3), labels, taps=(1, 3))
        expected = np.stack([np.asarray(x).mean(axis=1) for x in tokens], axis=1)
        np.testing.assert_allclose(features[:, 1], expected, rtol=1e-4, atol=1e-5)


def test_levels_of_ddpm_are_its_steps():
    t = times(GaussianDiffusion(), (0.0, 0.29, 0.5, 1.0))
    assert t.dtype == jnp.int32
    np.testing.assert_array_equal(t, [0, 290, 500, 999])


def test_an_interrupted_pass_goes_on(model, tmp_path, monkeypatch):
    """With a shard removed only that one is made again, and the rows are those of one uninterrupted pass."""
    monkeypatch.setattr("sra_jax.inspection.tokens.SHARD_BYTES", 1)  # a shard a batch
    dataset = datasets.load(model.config.data)
    indices = np.arange(3, 63)

    def extract():
        return extract_to_disk(model, dataset, indices, Settings((2,), (0.2,)), tmp_path, 16, "test")

    whole = extract()
    (folder,) = tmp_path.iterdir()
    times_before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(times_before) == ["features_00000.npy", "features_00001.npy", "features_00002.npy",
                                    "features_00003.npy", "labels_00000.npy", "labels_00001.npy",
                                    "labels_00002.npy", "labels_00003.npy", "manifest.json"]  # fmt: skip
    (folder / "labels_00002.npy").unlink()
    again = extract()
    changed = {path.name for path in folder.iterdir() if times_before[path.name] != path.stat().st_mtime_ns}
    assert changed == {"features_00002.npy", "labels_00002.npy"}
    order = np.random.default_rng(0).permutation(len(indices))
    np.testing.assert_array_equal(again.rows(order), whole.rows(order))
    np.testing.assert_array_equal(again.labels, [dataset.source[int(i)]["label"] for i in indices])


def test_rows_across_shards_that_stay_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("sra_jax.inspection.tokens.IN_MEMORY_BYTES", 0)
    parts = np.split(np.random.default_rng(0).standard_normal((10, 2, 1, 3), np.float32), [4, 7])
    for i, part in enumerate(parts):
        np.save(tmp_path / f"features_{i:05d}.npy", part)
        np.save(tmp_path / f"labels_{i:05d}.npy", np.zeros(len(part), np.int32))
    order = np.array([9, 0, 4, 6, 7, 3])
    np.testing.assert_array_equal(FeatureSet(tmp_path).rows(order), np.concatenate(parts)[order])


def test_probes_agree_with_logistic_regression(tmp_path):
    """Two levels and two blocks of differently informative features: accuracies are those of scikit-learn's solver."""
    generator = np.random.default_rng(1)
    centres = generator.standard_normal((4, 8))

    def make(folder, count):
        folder.mkdir()
        labels = generator.integers(0, 4, count).astype(np.int32)
        spread = np.array([[0.5, 1.0], [2.0, 4.0]])[..., None]
        features = centres[labels][:, None, None] + spread * generator.standard_normal((count, 2, 2, 8))
        np.save(folder / "features_00000.npy", (50 + 10 * features).astype(np.float32))
        np.save(folder / "labels_00000.npy", labels)
        return FeatureSet(folder)

    train, test = make(tmp_path / "train", 600), make(tmp_path / "test", 500)
    accuracy = probe(train, test, 4, Schedule(epochs=60, learning_rate=0.01))
    for (level, block), found in np.ndenumerate(accuracy):
        x, z = (s.rows(np.arange(len(s)))[:, level, block] / 10 for s in (train, test))
        expected = LogisticRegression(C=1e3, max_iter=2000).fit(x, train.labels).score(z, test.labels)
        assert found == pytest.approx(expected, abs=0.03)
    assert accuracy[0, 0] > accuracy[0, 1] > accuracy[1, 1]
