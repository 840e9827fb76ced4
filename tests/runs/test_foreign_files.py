"""What others put into a run's folder, or changed there, is refused in one line, and nothing of it is lost."""

import json
import os

import pytest

from configs import digits
from sra_jax import config as config_lib
from sra_jax.errors import UserError
from sra_jax.runs import environment, metrics
from sra_jax.runs.checkpoints import Checkpoints
from sra_jax.training import loop

pytestmark = [pytest.mark.fast, pytest.mark.faults]


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(config_lib.to_json(digits.get_config()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    return tmp_path


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}', '{"step": "1"}', "\x00\x00", ""])
def test_a_foreign_line_among_the_metrics(workdir, line):
    path = workdir / "metrics.jsonl"
    before = path.read_text().replace("\n", f"\n{line}\n", 1)
    path.write_text(before)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not a record"):
        metrics.keep_until(workdir, 1)
    assert path.read_text() == before


@pytest.mark.parametrize("end", ["", '{"step": 3, "lo', "\x00" * 9])
def test_a_last_line_that_was_cut_short(workdir, end):
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text() + end)
    assert [record["step"] for record in metrics.read(workdir)] == [1, 2]
    metrics.keep_until(workdir, 1)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '{"model": 5}', '{"steps": {"a": 1}}', '{"seed": "x"}'])
def test_not_a_config(workdir, text):
    (workdir / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        config_lib.check(config_lib.read(workdir / "config.json"))
    assert "\n" not in str(caught.value)


def test_a_config_of_a_newer_version(workdir):
    saved = json.loads((workdir / "config.json").read_text())
    saved["model"]["wings"] = 2
    saved["colour"] = "blue"
    (workdir / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"does not know: colour, model\.wings\. A newer version"):
        config_lib.read(workdir / "config.json")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "environment.json", "checkpoints", "samples"])
@pytest.mark.parametrize("kind", ["pipe", "other"])
def test_a_pipe_a_folder_or_a_file_in_the_place_of_the_other(workdir, name, kind):
    """Reading a pipe would wait for ever."""
    path = workdir / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif "." in name:
        path.mkdir()
    else:
        path.touch()
    with pytest.raises(UserError, match=rf"{name} is .* where a .* belongs: move it away"):
        loop.make_workdir(workdir)
    if name == "config.json":
        with pytest.raises(UserError, match="move it away"):
            config_lib.read(path)
    if name == "checkpoints":
        with pytest.raises(UserError, match="move it away"):
            Checkpoints(workdir, read_only=True)


def test_another_environment_is_refused_or_said(workdir, monkeypatch):
    config, said = digits.get_config(), []
    environment.write(workdir)
    assert loop.holds_run(config, workdir, False, said.append)
    assert said == []

    saved = json.loads((workdir / "environment.json").read_text())
    saved["settings"]["jax_enable_x64"] = not saved["settings"]["jax_enable_x64"]
    saved["settings"]["jax_of_another_version"] = 1
    (workdir / "environment.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"jax_enable_x64: .* -> .*\n.*--allow_config_change"):
        loop.holds_run(config, workdir, False, said.append)
    assert loop.holds_run(config, workdir, True, said.append)
    assert "jax_enable_x64" in said.pop()
    assert said == []

    environment.write(workdir)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_cpu_enable_fast_math=true")
    assert loop.holds_run(config, workdir, False, said.append)
    assert "--xla_cpu_enable_fast_math=true" in said[0]
    assert "dump" not in said[0]

    for text in ("", "[]", "{}", '{"settings": 1}'):
        (workdir / "environment.json").write_text(text)
        with pytest.raises(UserError, match="not a record of a run's environment"):
            loop.holds_run(config, workdir, False, said.append)
