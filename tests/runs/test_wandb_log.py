"""log.wandb: what a real run writes for Weights & Biases (offline), and what is said where it cannot."""

import importlib.util
import json
import struct

import numpy as np
import pytest
from PIL import Image

from configs import digits
from sra_jax.errors import UserError
from sra_jax.runs import metrics, wandb_log
from sra_jax.training.loop import train
from tests.conftest import TINY_DIGITS, run

HAS_WANDB = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed: pip install wandb")


def stored(path):
    """The records of a .wandb file, serialised: LevelDB's log format behind seven bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at < len(data):
        left = 32768 - at % 32768  # of the block
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a record is whole
            yield whole
            whole = b""


def offline_runs(workdir):
    """The runs that wandb wrote in a workdir, in order: (id, config, step -> values, images)."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb")):
        name, config, rows = "", {}, {}
        for data in stored(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                name = record.run.run_id
                config = {each.key: json.loads(each.value_json) for each in record.run.config.update}
            elif record.HasField("history"):
                row = {each.key or each.nested_key[0]: json.loads(each.value_json) for each in record.history.item}
                rows[row["_step"]] = {key: value for key, value in row.items() if not key.startswith("_")}
        found.append((name, config, rows, sorted((path.parent / "files" / "media" / "images").glob("*.png"))))
    return found


@needs_wandb
def test_a_resumed_workdir_is_one_run_with_all_that_is_logged(tmp_path):
    flags = (*TINY_DIGITS, f"--workdir={tmp_path}", "--config.log.wandb=a_project", "--config.sample_every=8")
    offline = {"WANDB_MODE": "offline"}
    run("main.py", *flags, "--config.steps=8", environment=offline)
    run("main.py", *flags, "--config.steps=16", environment=offline)
    first, second = offline_runs(tmp_path)
    assert first[0] == second[0] == json.loads((tmp_path / wandb_log.FILE).read_text())["id"]
    assert first[1]["batch_size"] == 16
    assert first[1]["alignment"]["teacher_block"] == 2
    records = {record.pop("step"): record for record in metrics.read(tmp_path)}
    assert list(records) == [4, 8, 12, 16]
    for (_, _, rows, images), steps in ((first, (4, 8)), (second, (12, 16))):
        assert tuple(rows) == steps
        for step in steps:
            row = rows[step]
            picture = row.pop("samples", None)
            assert row == records[step]
            assert (picture is not None) == (step % 8 == 0)
        (image,) = images
        preview = tmp_path / "samples" / f"step_{steps[-1]:07d}.png"
        np.testing.assert_array_equal(Image.open(image).convert("RGB"), Image.open(preview).convert("RGB"))


LOSES_ITS_SERVICE = """
import os, pathlib, signal, sys
import numpy as np
from sra_jax.runs import wandb_log

writer = wandb_log.Writer("a_project", "a_run", pathlib.Path(sys.argv[1]), {})
writer.write(1, {"loss": 1.0})
(service,) = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
os.kill(int(service), signal.SIGKILL)
os.waitpid(int(service), 0)
writer.write(2, {"loss": 0.5})
writer.image(2, "samples", np.zeros((8, 8, 3), np.uint8))
writer.close()
print("trained on", flush=True)
os._exit(0)
"""


@needs_wandb
@pytest.mark.faults
def test_training_outlives_the_service(tmp_path):
    """Its process is killed: that is said once, and nothing is raised."""
    done = run("-c", LOSES_ITS_SERVICE, str(tmp_path), environment={"WANDB_MODE": "offline"})
    assert done.stdout == "trained on\n"
    assert done.stderr.count("warning: Weights & Biases takes no more of this run") == 1


@needs_wandb
def test_without_an_account_it_says_what_to_do(tmp_path):
    """Before any work: there is no id yet."""
    environment = {"WANDB_MODE": "online", "HOME": str(tmp_path / "home"), "WANDB_API_KEY": ""}
    flags = (*TINY_DIGITS, f"--workdir={tmp_path}/run", "--config.log.wandb=a_project")
    done = run("main.py", *flags, environment=environment, code=2)
    assert "log.wandb='a_project': No API key configured. Use `wandb login` to log in. WANDB_MODE=offl" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / wandb_log.FILE).exists()


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_without_the_package_it_says_how_to_get_it(tmp_path):
    config = digits.get_config()
    config.log.wandb = "a_project"
    with pytest.raises(UserError, match=r"log\.wandb='a_project' needs the package wandb: pip install wandb, or leave"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_id_is_made_once_and_a_foreign_file_refused(tmp_path):
    path = tmp_path / wandb_log.FILE
    name = wandb_log._run_id(path)
    assert wandb_log._run_id(path) == name
    path.write_text("[]")
    with pytest.raises(UserError, match="holds no id of a run"):
        wandb_log._run_id(path)
