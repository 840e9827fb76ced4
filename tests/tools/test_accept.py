"""tools/accept.py: as an owner of a new machine runs it, and what becomes of parts that fail."""

import json
import multiprocessing
import signal
import time
from pathlib import Path

import pytest

from configs import sit_b2
from sra_jax import config as config_lib
from sra_jax.benchmarks import acceptance
from sra_jax.benchmarks.acceptance import Settings, Unfinished, accept, passed, row, table
from sra_jax.errors import UserError
from tests.conftest import run
from tests.in_process import call
from tests.running import start


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


def below(pid):
    """Processes that a process started, and those that they started."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [each for child in found for each in below(child)]


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_told_to_end_it_leaves_no_process_and_goes_on_where_it_was(number, code, tmp_path):
    """A part whose process runs main.py in another is stopped; the part before it is not done again."""
    flags = ("--quick", f"--output={tmp_path}", "--parts=machine,resume")
    running = start("tools/accept.py", *flags, fresh=True)
    started = set()

    def two_generations():
        assert running.poll() is None
        started.update(below(running.pid))
        return any("main.py" in Path(f"/proc/{pid}/cmdline").read_text() for pid in started if lives(pid))

    wait_for(two_generations)
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code
    wait_for(lambda: not any(lives(pid) for pid in started))
    said = {75: "told to make room: finished parts are kept; start the same command again", -9: "",
            130: "interrupted: finished parts are kept; the same command goes on from there"}[code]  # fmt: skip
    assert said in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.glob("*.json")] == [acceptance.UNFINISHED]
    kept = json.loads((tmp_path / acceptance.UNFINISHED).read_text())["results"]
    assert list(kept) == ["machine"]
    refused = call("accept", *flags[:2], "--parts=machine", code=2)
    assert "holds parts of a run with other parts" in refused.stderr
    if number == signal.SIGTERM:
        done = call("accept", *flags)
        assert "[1/2] machine: was done before" in done.stderr
        results = json.loads((tmp_path / acceptance.JSON).read_text())
        assert results["machine"] == kept["machine"]
        assert results["resume"]["bit_for_bit"]
        assert sorted(path.name for path in tmp_path.iterdir()) == [acceptance.JSON, acceptance.TABLE]


def test_finished_parts_are_kept_and_used_by_the_same_run_only(tmp_path):
    done = {"rows": [row("a", "1")], "batches": {"tiny": 4}, "seconds": 1.0}
    unfinished = Unfinished(tmp_path, QUICK, ("machine", "train_step"))
    assert unfinished.read(False) == {}
    unfinished.write({"machine": {"failed": "a reason", "seconds": 2.0}, "train_step": done})
    assert unfinished.read(False) == unfinished.read(True) == {"train_step": done}
    other = Unfinished(tmp_path, Settings(quick=False, recipes={}, root="."), ("machine",))
    with pytest.raises(UserError, match="holds parts of a run with other quick, recipes, parts"):
        other.read(False)
    assert other.read(True) == {}
    lines, kept = [], []
    results = accept(QUICK, ("train_step", "equality"), 300, lines.append, unfinished.read(False), kept.append)
    assert results["train_step"] == done
    assert lines[0] == "[1/2] train_step: was done before"
    assert kept == [results]
    unfinished.remove()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / acceptance.UNFINISHED).write_text("[]")
    with pytest.raises(UserError, match="holds no parts of an acceptance run"):
        unfinished.read(True)


def test_a_wrong_result_is_told_from_a_right_one_and_from_none():
    right, wrong, none = row("a", "1", True), row("b", "2 | 3", False), row("c", "4")
    assert passed({"rows": [right, none]})
    assert not passed({"rows": [right, wrong]})
    lines = table({"part": {"rows": [right, wrong, none]}}).splitlines()
    assert lines[2:] == ["| part | a | 1 | yes |", "| part | b | 2 \\| 3 | **no** |", "| part | c | 4 |  |"]
