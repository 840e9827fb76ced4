"""tools/study.py: a matrix of runs as one job that goes on, adds what is missing and shares its cells."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from sra_jax import files
from sra_jax.benchmarks.study import Cell, cells_of
from sra_jax.benchmarks.study_report import Mean, read_arms
from tests.conftest import TINY_DIGITS, run, start
from tests.in_process import call

TINY = (
    *(flag for flag in TINY_DIGITS if not flag.startswith(("--config.checkpoint_every", "--config.sample_every"))),
    "--config.steps=8", "--config.evaluation.extractor=classifier", "--config.evaluation.num_samples=40",
    "--config.evaluation.batch_size=40", "--config.sampling.steps=2", "--config.sampling.guidance_scale=1.0",
    "--measure_at=4,8", "--probe_levels=0.25", "--probe_examples=200", "--probe_tests=80",
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory, classifier_cache):
    """The output of `none` by a command, and of `sra`, added in this process."""
    output = tmp_path_factory.mktemp("study") / "study"
    run("tools/study.py", *TINY, "--methods=none", "--seeds=0", f"--output={output}", devices=8)
    first = (output / "cells" / "none-seed0.json").stat().st_mtime_ns
    call("study", *TINY, "--methods=none,sra", "--seeds=0", f"--output={output}")
    return output, first


@pytest.fixture(scope="module")
def pairs(study, tmp_path_factory):
    """The study's cells without its runs, and another seed of each with numbers of its own."""
    output = tmp_path_factory.mktemp("pairs") / "study"
    shutil.copytree(study[0] / "cells", output / "cells")
    shutil.copy(study[0] / "extractor.safetensors", output)
    for method, factor in (("none", 1.25), ("sra", 1.5)):
        record = cell(output, f"{method}-seed0")
        record["seed"] = record["config"]["seed"] = 1
        for point in record["points"]:
            point["fid"] *= factor
        (output / "cells" / f"{method}-seed1.json").write_text(json.dumps(record))
    call("study", *TINY, "--methods=none,sra", "--seeds=0,1", f"--output={output}")
    return output


def cell(output, name):
    return json.loads((output / "cells" / f"{name}.json").read_text())


def test_what_is_missing_is_added_and_nothing_made_twice(study):
    output, first = study
    names = {path.stem for path in (output / "cells").glob("*.json")}
    assert names == {"none-seed0", "sra-seed0"}
    assert (output / "cells" / "none-seed0.json").stat().st_mtime_ns == first
    assert {path.name for path in (output / "runs").iterdir()} == names
    assert {path.name for path in output.glob("*.*")} == {
        "study.md", "study.json", "metrics.png", "probe.png", "extractor.safetensors", "reference.npz"
    }  # fmt: skip


def test_a_cell_holds_its_run_and_how_it_was_measured(study):
    record = cell(study[0], "sra-seed0")
    assert (record["config"]["seed"], record["config"]["method"]["name"], record["config"]["steps"]) == (0, "sra", 8)
    assert [point["step"] for point in record["points"]] == [4, 8]
    for point in record["points"]:
        assert {"fid", "fid_infinity", "kid", "precision", "recall", "accuracy", "denoising"} <= point.keys()
        assert 0 < point["health"]["sra/target_rank"] < 256
    assert np.shape(record["points"][1]["probe"]) == (1, 3)
    assert "probe" not in record["points"][0]
    assert record["protocol"]["sampling"]["seed"] == 0
    assert record["flops_per_step"] > cell(study[0], "none-seed0")["flops_per_step"]
    assert record["losses"]["step"] == [4, 8]


def test_differences_are_paired_by_seed(pairs):
    output, summary = pairs, json.loads((pairs / "study.json").read_text())
    base, method = summary["arms"]
    assert (base["arm"], method["arm"], method["seeds"]) == ("none", "sra", [0, 1])
    for number, step in enumerate((4, 8)):
        values = {name: [cell(output, f"{name}-seed{seed}")["points"][number]["fid"] for seed in (0, 1)]
                  for name in ("none", "sra")}  # fmt: skip
        pairs = np.subtract(values["sra"], values["none"])
        found = method["points"][number]["fid"]
        assert found["mean"] == pytest.approx(np.mean(values["sra"]))
        assert found["difference"]["mean"] == pytest.approx(pairs.mean())
        assert found["difference"]["error"] == pytest.approx(pairs.std(ddof=1) / 2**0.5)
        assert found["difference"]["seeds"] == 2
        assert method["points"][number]["step"] == step
    table = (output / "study.md").read_text()
    assert "| sra | 0, 1 |" in table
    assert table.index("FID by step:") < table.index("Step ") < table.index("Probe accuracy")


def test_cells_alone_are_enough(pairs):
    """Without the folders of its runs a study makes its table, and trains nothing."""
    assert not (pairs / "runs").exists()
    table = (pairs / "study.md").read_text()
    (pairs / "study.md").unlink()
    assert call("study", f"--output={pairs}", "--report").stdout == table


@pytest.mark.faults
def test_a_cell_that_another_process_makes_is_left_to_it(study, tmp_path):
    output = shutil.copytree(study[0], tmp_path / "study")
    for name in ("sra-seed0", "none-seed0"):
        (output / "cells" / f"{name}.json").unlink()
    with files.locked_output(output / "cells" / "sra-seed0.json", "wait"):
        done = call("study", *TINY, "--methods=none,sra", "--seeds=0", f"--output={output}")
    assert "sra-seed0.json is being written by process" in done.stderr
    assert "1 cell(s) are being made by other processes" in done.stderr
    assert not (output / "cells" / "sra-seed0.json").exists()
    made = cell(output, "none-seed0")  # of what its run's folder has
    assert made["points"] == cell(study[0], "none-seed0")["points"]


def test_another_way_of_measuring_or_training_is_refused(study):
    output, _ = study
    for flag, said in (
        ("--config.evaluation.num_samples=41", "num_samples: 40 -> 41"),
        ("--config.optimizer.learning_rate=0.003", "optimizer.learning_rate: 0.002 -> 0.003"),
    ):
        done = call("study", *TINY, flag, "--methods=none", "--seeds=0", f"--output={output}", code=2)
        assert "none-seed0.json was made in another way" in done.stderr
        assert said in done.stderr


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--shard=2/2",), "--shard=2/2 must be i/n"),
        (("--measure_at=4,7",), "the last one the run's own end (--config.steps=8)"),
        (("--vary=seed=3",), "--vary=seed=3: seed is decided by --seeds"),
        (("--vary=sampling.steps=3",), "sampling.steps is the same for all cells"),
        (("--vary=model.breadth=3",), "the recipe has no key model.breadth"),
        (("--vary=model.depth",), "must be KEY=VALUE"),
        (("--methods=none,layer",), "unknown variant 'layer'"),
        (("--methods=none,none",), "--methods=none,none names one twice"),
        (("--config.seed=3",), "--config.seed is decided by --seeds"),
        (("--probe_levels=2",), "noise levels between 0 (data) and 1"),
        (("--config.steps=1000", "--measure_at=999,1000"), "a checkpoint would be saved every 1 steps"),
        (("--report",), "holds no finished cell"),
    ],
)
def test_bad_input(tmp_path, flags, said):
    done = call("study", *TINY, f"--output={tmp_path / 'study'}", *flags, code=2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "study" / "runs").exists()


def test_pairs_come_first():
    cells = cells_of(["none", "sra+dispersive"], [3, 4], {"model.width": ["32", "64"], "data": ["a/b"]})
    assert cells[0] == Cell("none", 3, (("model.width", "32"), ("data", "a/b")))
    assert [(one.method, one.seed) for one in cells[:4]] == [("none", 3), ("sra+dispersive", 3)] * 2
    assert cells[1].name == "sra+dispersive-model.width=32-data=a_b-seed3"
    assert cells[1].arm == "sra+dispersive, model.width=32, data=a/b"


def test_mean_and_error():
    one = Mean.of([1.0, 2.0, 4.0])
    assert (one.mean, one.error) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5))
    assert one.text(1) == "2.3 ± 0.9"
    assert Mean.of([-1.5]).text(2, signed=True) == "-1.50"


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_study_ends_as_one_that_was_not(study, tmp_path):
    """Killed as soon as the second cell has saved something, and again while it measures."""
    command = ("tools/study.py", *TINY, "--methods=none,sra", "--seeds=0", f"--output={tmp_path}")
    for trace in ("runs/sra-seed0/checkpoints/4", "runs/sra-seed0/evaluation/study_0000004_*.json"):
        process = start(*command, devices=8)
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob(trace)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(*command, devices=8)
    for name in ("none-seed0", "sra-seed0"):
        assert cell(tmp_path, name)["points"] == cell(study[0], name)["points"]
    assert [arm.name for arm in read_arms(tmp_path)] == ["none", "sra"]
