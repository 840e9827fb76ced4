"""Runs, data and results in a bucket, by the libraries that a user has there, against a server on loopback."""

import io
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from sra_jax import config as config_lib
from sra_jax import files, remote
from sra_jax.data import latents, shards
from sra_jax.errors import UserError
from sra_jax.runs import metrics
from sra_jax.runs.checkpoints import check_writable
from sra_jax.runs.trained import TrainedModel
from tests.buckets import bucket, storage  # noqa: F401
from tests.checkpoints import final_state
from tests.conftest import TINY_DIGITS, run, start
from tests.fixtures import image_folder, tiny_vae  # noqa: F401
from tests.in_process import call
from tests.runs.test_resume import logged


def array_of(path, name):
    with np.load(io.BytesIO(remote.path(path).read_bytes())) as arrays:
        return arrays[name]


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_in_a_bucket_is_the_run_in_a_folder(tiny_run, bucket, tmp_path):  # noqa: F811
    """Killed and resumed; then everything that tools do with a run, without a local folder."""
    workdir = f"{bucket}/runs/one"
    there = remote.path(workdir)
    profile = ("--config.profile.start=20", "--config.profile.steps=2")
    command = ("main.py", *TINY_DIGITS, "--config.sample_every=24", *profile, f"--workdir={workdir}")
    process = start(*command)
    while not (there / "checkpoints" / "6" / "commit_success.txt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert "resuming gs://" in run(*command).stdout
    jax.tree.map(np.testing.assert_array_equal, final_state(there), final_state(tiny_run))
    records = [{k: v for k, v in record.items() if not metrics.clocked(k)} for record in metrics.read(there)]
    assert records == logged(tiny_run)
    assert {path.name for path in there.iterdir()} == {path.name for path in tiny_run.iterdir()} | {"profile"}
    assert any(path.name.endswith(".xplane.pb") for path in remote.walk(there / "profile"))
    preview = (there / "samples" / "step_0000024.png").read_bytes()
    assert preview == (tiny_run / "samples" / "step_0000024.png").read_bytes()
    assert len(list((there / "tensorboard").iterdir())) == 2  # of each start

    cache = {"SRA_JAX_CACHE": str(tmp_path / "cache")}
    flags = ("--num_samples=20", "--sampling_steps=2")
    run("tools/sample.py", f"--workdir={workdir}", *flags, f"--output={bucket}/out/a.npz", f"--grid={bucket}/out/a.png")
    run("tools/sample.py", f"--workdir={tiny_run}", *flags, f"--output={tmp_path / 'b.npz'}")
    np.testing.assert_array_equal(array_of(f"{bucket}/out/a.npz", "arr_0"), np.load(tmp_path / "b.npz")["arr_0"])
    assert Image.open(io.BytesIO(remote.path(f"{bucket}/out/a.png").read_bytes())).size
    done = run("tools/sample.py", f"--workdir={workdir}", *flags, f"--output={bucket}/out/a.npz", code=2)
    assert "exists and is not overwritten" in done.stderr

    evaluate = (
        "tools/fid.py", "--reference=dataset", "--extractor=classifier", "--num_samples=60", "--sampling_steps=2"
    )  # fmt: skip
    run(*evaluate, f"--workdir={workdir}", f"--json={bucket}/out/fid.json", environment=cache)
    result = json.loads(remote.path(f"{bucket}/out/fid.json").read_text())
    assert result["fid"] > 0
    assert json.loads((there / "evaluation" / "step_0000024.json").read_text()) == result
    assert not list((there / "evaluation").glob("unfinished_*"))

    probe = ("tools/linear_probe.py", "--epochs=1", "--levels=0,0.5", "--blocks=1,3", "--num_examples=200")
    run(*probe, f"--workdir={workdir}", f"--output={bucket}/out/probe", environment=cache)
    assert {path.name for path in remote.path(f"{bucket}/out/probe").iterdir()} == {
        "probe.json", "probe.csv", "probe.png"
    }  # fmt: skip
    run("tools/pca.py", f"--workdir={workdir}", f"--output={bucket}/out/pca.png", "--levels=0.5")
    assert files.exists(f"{bucket}/out/pca.png")

    convert = "tools/convert_checkpoint.py"
    run(convert, f"--workdir={workdir}", "--export=ema", f"--output={bucket}/out/ema.safetensors")
    imported = f"{bucket}/runs/imported"
    run(convert, f"--checkpoint={bucket}/out/ema.safetensors", f"--workdir={imported}", "--heads=2",
        "--config=configs/digits.py", *TINY_DIGITS[1:], environment=cache)  # fmt: skip
    done = run(convert, f"--checkpoint={bucket}/out/ema.safetensors", f"--workdir={imported}", "--heads=2",
               "--config=configs/digits.py", *TINY_DIGITS[1:], environment=cache, code=2)  # fmt: skip
    assert "exists and is not empty" in done.stderr
    started = run("main.py", *TINY_DIGITS, "--config.steps=1", f"--config.init_from={imported}",
                  f"--workdir={tmp_path / 'new'}")  # fmt: skip
    assert f"starting from the EMA and its head of step 0 in {imported}" in started.stdout


@pytest.mark.slow
@pytest.mark.faults
def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(tiny_run, bucket):  # noqa: F811
    there = remote.path(f"{bucket}/run")
    command = ("main.py", *TINY_DIGITS, f"--workdir={there}")
    run(*command, "--config.steps=12")
    data = next(path for path in remote.walk(there / "checkpoints" / "12" / "ema") if path.parent.name == "d")
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    done = run(*command)
    assert f"checkpoint {there}/checkpoints/12 is damaged" in done.stdout
    assert f"resuming {there} at step 6" in done.stdout
    assert {path.name for path in (there / "damaged_checkpoints").iterdir()} == {"12"}
    assert files.exists(there / "damaged_checkpoints" / "12" / "meta" / "metadata")
    jax.tree.map(np.testing.assert_array_equal, final_state(there), final_state(tiny_run))


@pytest.mark.faults
def test_a_place_for_a_run_is_tried_before_any_work(bucket, tmp_path, monkeypatch):  # noqa: F811
    check_writable("--workdir", remote.path(f"{bucket}/run"))
    assert not list(remote.walk(remote.path(bucket)))
    with pytest.raises(UserError, match=r"no-such-bucket/run cannot be reached \(there is no such bucket\): check"):
        check_writable("--workdir", remote.path("gs://no-such-bucket/run"))
    with pytest.raises(UserError, match="--workdir=hf://a/b/c: runs are kept in local folders and at gs://"):
        check_writable("--workdir", remote.path("hf://a/b/c"))
    with pytest.raises(UserError, match=r"--workdir=hf://a/b: runs are kept .* come in by tools/convert_checkpoint.py"):
        TrainedModel(remote.path("hf://a/b"))
    with pytest.raises(UserError, match=r"no run at gs://no-such-bucket/run: config.json cannot be read"):
        TrainedModel(remote.path("gs://no-such-bucket/run"))


def test_latents_are_copied_from_a_bucket_once(image_folder, tiny_vae, bucket, tmp_path, capsys):  # noqa: F811
    local, address = tmp_path / "latents", f"{bucket}/data/latents"
    call("prepare_latents", f"--source=imagefolder:{image_folder}", f"--vae={tiny_vae.folder}", "--image_size=16",
         "--batch_size=8", "--shard_size=2", f"--output={local}")  # fmt: skip
    files.send_folder(local, remote.path(address))
    files.send_folder(tiny_vae.folder, remote.path(f"{bucket}/vae"))
    data = config_lib.default().data
    data.update(
        name="latents", path=address, cache=str(tmp_path / "disk"), image_size=8, channels=4, num_classes=2,
        vae=f"{bucket}/vae",
    )  # fmt: skip
    there = latents.load(data)
    assert "copying 3 files" in capsys.readouterr().err
    with data.unlocked():
        data.path = str(local)
    here = latents.load(data)
    rows = np.arange(len(here.source))
    jax.tree.map(np.testing.assert_array_equal, there.source.read_batch(rows), here.source.read_batch(rows))
    data.path = address
    latents.load(data)
    assert not capsys.readouterr().err
    assert latents.decoder(data)(np.zeros((1, 8, 8, 4), np.float32)).shape == (1, 16, 16, 3)

    shard = shards.read_manifest(address).shards[1]
    (remote.path(address) / shard.file).write_bytes(b"short")
    files._copies.clear()
    with pytest.raises(UserError, match=f"{shard.file} cannot be fetched .*another checksum than was written"):
        latents.load(data)
    (remote.path(address) / shard.file).unlink()
    with pytest.raises(UserError, match=f"{shard.file} does not exist"):
        latents.load(data)
    data.path = f"{bucket}/nothing"
    with pytest.raises(UserError, match=rf"no prepared latents at {bucket}/nothing"):
        latents.load(data)
