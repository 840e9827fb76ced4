"""tools/accept.py: as an owner of a new machine runs it, and what becomes of parts that fail."""

import json
import multiprocessing
import time

import pytest

from configs import sit_b2
from sra_jax import config as config_lib
from sra_jax.benchmarks import acceptance
from sra_jax.benchmarks.acceptance import Settings, accept, passed, row, table
from tests.conftest import run
from tests.in_process import call


@pytest.mark.slow
def test_everything_on_a_cpu(tmp_path):
    """All parts, at small sizes: each is done, all is right, and the table and the figures say the same."""
    done = run("tools/accept.py", "--quick", f"--output={tmp_path}/a", fresh=True)
    results = json.loads((tmp_path / "a" / acceptance.JSON).read_text())
    assert list(results) == list(acceptance.PARTS)
    assert all(passed(result) for result in results.values())
    assert (tmp_path / "a" / acceptance.TABLE).read_text() == table(results) == done.stdout
    assert results["equality"]["differences"]["float32"] == {"loss": 0.0, "gradient": 0.0, "ten steps": 0.0}
    assert 0 < results["equality"]["differences"]["bfloat16"]["gradient"] < 3e-2
    assert [figure["implementation"] for figure in results["attention"]["implementations"]] == ["plain", "plain"]
    (step,) = results["train_step"]["recipes"].values()
    config = sit_b2.get_config("smoke")
    config.batch_size = step["batch_size"]
    assert step["flops"] == config_lib.step_flops(config).total
    assert step["flops_per_second"] == pytest.approx(step["flops"] / step["step_seconds"])
    assert results["resume"]["bit_for_bit"]
    assert results["resume"]["killed_at"] == -9
    for number, name in enumerate(acceptance.PARTS, 1):
        assert f"[{number}/8] {name}: done (" in done.stderr


def test_one_part_and_nothing_is_replaced(tmp_path):
    output = tmp_path / "new" / "folder"
    flags = ("--quick", f"--output={output}", "--parts=machine")
    done = run("tools/accept.py", *flags)
    results = json.loads((output / acceptance.JSON).read_text())
    assert list(results) == ["machine"]
    machine = results["machine"]
    assert (machine["platform"], machine["devices"]) == ("cpu", 1)
    assert {"jax", "jaxlib", "flax"} <= machine["versions"].keys()
    assert all(rate > 0 for rate in machine["matmul_flops_per_second"].values())
    assert done.stdout.startswith("| part | what | measured | right |")
    before = (output / acceptance.JSON).read_bytes()
    refused = call("accept", *flags, code=2)
    assert "exists and is not overwritten" in refused.stderr
    assert (output / acceptance.JSON).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--output"),
        (("--output={tmp}/a", "--parts=machine,speed"), "--parts=speed is unknown; allowed: machine, equality"),
        (("--output={tmp}/file",), "file is no folder"),
        (("--output={tmp}/a", "--part_seconds=0"), "part_seconds"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    (tmp_path / "file").touch()
    done = call("accept", *(argument.format(tmp=tmp_path) for argument in arguments), code=2)
    assert message in done.stderr
    assert not (tmp_path / "a").exists()


QUICK = Settings(quick=True, recipes={"tiny": "{"}, root=".")
"""Its recipe is no JSON: whatever reads it fails."""


def test_a_part_that_fails_is_reported_and_the_rest_goes_on():
    lines = []
    results = accept(QUICK, ("equality", "machine"), 300, lines.append)
    assert "JSONDecodeError" in results["equality"]["failed"]
    assert passed(results["machine"])
    assert not passed(results["equality"])
    assert "FAILED, JSONDecodeError" in lines[1]
    assert "| equality |  | JSONDecodeError" in table(results)


def test_a_part_that_takes_too_long_is_ended():
    start = time.monotonic()
    results = accept(QUICK, ("machine",), 0.2, lambda line: None)
    assert results["machine"]["failed"] == "took longer than 0 s; give it more by --part_seconds"
    assert time.monotonic() - start < 10
    assert not multiprocessing.active_children()


def test_a_wrong_result_is_told_from_a_right_one_and_from_none():
    right, wrong, none = row("a", "1", True), row("b", "2 | 3", False), row("c", "4")
    assert passed({"rows": [right, none]})
    assert not passed({"rows": [right, wrong]})
    lines = table({"part": {"rows": [right, wrong, none]}}).splitlines()
    assert lines[2:] == ["| part | a | 1 | yes |", "| part | b | 2 \\| 3 | **no** |", "| part | c | 4 |  |"]
