"""Runs of several real processes over loopback: the same numbers as one process, and no process hangs."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from sra_jax.distributed.processes import detect
from tests.conftest import ROOT, TINY_DIGITS, command_environment, run, start

STEPS = 20
HEARTBEAT = 20
END_SECONDS = 2 * HEARTBEAT + 30
COMMON = (
    *TINY_DIGITS, f"--config.steps={STEPS}", "--config.log_every=1", "--config.checkpoint_every=8",
    f"--heartbeat_seconds={HEARTBEAT}",
)  # fmt: skip


RESERVED = []
GLOO = re.compile(r"Gloo|Rank|connected|peer ranks")


def reserve_port():
    """A port for a coordinator. It stays bound here, so that nothing else on this machine is given it meanwhile; the
    coordinator may still listen there, since both ask for a shared port, as gRPC does of itself."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    RESERVED.append(holder)
    return holder.getsockname()[1]


def start_two(*arguments, devices=4):
    """Two processes of one run, with so many simulated devices each.

    Without the cache of compiled programs: JAX keeps those of process 0 alone, so that process 1 would compile while
    process 0 waits for it, for no longer than Gloo's 30 seconds.
    """
    port = reserve_port()
    together = (f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2")
    return [
        start(
            "main.py", *COMMON, *arguments, *together, f"--process_id={i}", devices=devices,
            environment={"JAX_ENABLE_COMPILATION_CACHE": "false"},
        )
        for i in range(2)
    ]  # fmt: skip


def finish(running, seconds=600):
    """(exit code, stdout, stderr) of each; a process that does not end in time fails the test."""
    deadline = time.monotonic() + seconds
    results = []
    try:
        for process in running:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            results.append((process.returncode, out, err))
    finally:
        for process in running:
            process.kill()
    return results


def wait_for(path, running):
    while not path.exists():
        assert all(process.poll() is None for process in running), finish(running)
        time.sleep(0.02)


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return {key: [r[key] for r in records] for key in ("loss", "loss_denoising", "loss_alignment", "grad_norm")}


def assert_same_losses(actual, expected):
    for name, values in losses(expected).items():
        np.testing.assert_allclose(losses(actual)[name], values, rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, one device."""
    workdir = tmp_path_factory.mktemp("alone")
    run("main.py", *COMMON, f"--workdir={workdir}")
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two processes of four devices, the state split over both and twice held."""
    workdir = tmp_path_factory.mktemp("together")
    first, second = finish(start_two("--config.mesh.fsdp=4", f"--workdir={workdir}"))
    assert first[0] == second[0] == 0, (first, second)
    assert "8 cpu device(s)" in first[1]
    # Process 0 speaks for all. Gloo's own lines come from several threads and may lie within each other.
    assert "done." in first[1]
    for line in second[1].splitlines():
        assert GLOO.search(line) or not re.search("[a-z]", line), line
    return workdir


@pytest.mark.slow
def test_two_processes_train_as_one(together, alone):
    assert_same_losses(together, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "mesh"),
    [(1, ()), (4, ("--config.mesh.fsdp=4",)), (8, ("--config.mesh.fsdp=2", "--config.mesh.model=2"))],
)
def test_a_run_of_two_processes_goes_on_with_one(together, alone, tmp_path, devices, mesh):
    """From the checkpoint of step 8, on fewer devices or another mesh: the same batches, noise and losses."""
    workdir = tmp_path / "run"
    shutil.copytree(together, workdir)
    for step in (16, 20):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    done = run("main.py", *COMMON, *mesh, f"--workdir={workdir}", devices=devices)
    assert "at step 8" in done.stdout
    assert_same_losses(workdir, alone)


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
@pytest.mark.faults
def test_killed_damaged_and_preempted(tmp_path, alone):
    """SIGKILL of one of two ends the other; a damaged checkpoint is passed over by both, though only one cannot read
    it; SIGTERM to one saves on both; and through all of it the losses are those of an undisturbed run."""
    workdir = tmp_path / "run"
    arguments = (f"--workdir={workdir}", "--config.mesh.fsdp=8", "--config.steps=100000")

    running = start_two(*arguments)
    wait_for(workdir / "checkpoints" / "16", running)
    os.kill(running[1].pid, signal.SIGKILL)
    (code, _, message), _ = finish(running, seconds=END_SECONDS)
    assert code == 1
    assert f"process 1 (pid {running[1].pid} on " in message

    *_, before, newest = saved_steps(workdir)
    for path in (workdir / "checkpoints" / str(newest) / "params").rglob("*"):
        if path.is_file() and "ocdbt.process_1" in str(path):
            path.write_bytes(b"")
    running = start_two(*arguments)
    wait_for(workdir / "checkpoints" / str(newest + 8), running)
    running[1].send_signal(signal.SIGTERM)
    (code, out, message), (other, _, _) = finish(running)
    assert code == other == 75, message
    assert f"checkpoints/{newest} is damaged" in out
    assert f"resuming {workdir} at step {before}" in out
    assert (workdir / "damaged_checkpoints" / str(newest)).is_dir()
    preempted = saved_steps(workdir)[-1]
    assert f"step {preempted} of 100000 is saved; start the same command again" in message

    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, preempted + 1))
    np.testing.assert_allclose([r["loss"] for r in records[:STEPS]], losses(alone)["loss"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.faults
def test_interrupted_and_stopped(tmp_path):
    """Ctrl-C at one of two saves on both and ends both; where one stands still, the other says so and ends."""
    workdir = tmp_path / "run"
    arguments = (f"--workdir={workdir}", "--config.steps=100000")
    running = start_two(*arguments)
    wait_for(workdir / "checkpoints" / "8", running)
    running[1].send_signal(signal.SIGINT)
    (other, _, message), (code, _, notice) = finish(running, seconds=END_SECONDS)
    saved = saved_steps(workdir)[-1]
    assert code == 130, notice
    assert f"interrupted: step {saved} of 100000 is saved" in notice
    assert other == 75, message

    running = start_two(*arguments)
    wait_for(workdir / "checkpoints" / str(saved // 8 * 8 + 8), running)
    running[1].send_signal(signal.SIGSTOP)
    try:
        running[0].wait(timeout=END_SECONDS)
    finally:
        running[1].kill()
    (code, _, message), _ = finish(running)
    assert code == 1, message
    assert f"process 1 (pid {running[1].pid} on " in message
    assert "silent for" in message
    assert "the run goes on from its newest checkpoint" in message


@pytest.mark.slow
@pytest.mark.faults
def test_ctrl_c_of_a_run_alone(tmp_path):
    """Of its whole process group, with workers that read for it, as a terminal sends it."""
    process = subprocess.Popen(
        [sys.executable, "main.py", *COMMON, "--config.steps=100000", "--config.data.workers=1",
         f"--workdir={tmp_path}"], cwd=ROOT, env=command_environment(), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(tmp_path / "checkpoints" / "8", [process])
    os.killpg(process.pid, signal.SIGINT)
    ((code, _, message),) = finish([process])
    assert code == 130, message
    saved = saved_steps(tmp_path)[-1]
    assert f"interrupted: step {saved} of 100000 is saved; the same command goes on from there" in message
    assert "Traceback" not in message


@pytest.mark.faults
def test_sigterm_of_a_run_alone(tmp_path):
    process = start("main.py", *COMMON, "--config.steps=100000", f"--workdir={tmp_path}")
    wait_for(tmp_path / "checkpoints" / "8", [process])
    process.send_signal(signal.SIGTERM)
    ((code, _, message),) = finish([process])
    assert code == 75, message
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"step {saved} of 100000 is saved" in message
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == saved


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8"}, None),  # a shell inside an allocation
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"PMI_SIZE": "4"}, "MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_launchers(variables, launcher):
    assert detect({"JAX_PLATFORMS": "cpu", **variables}) == launcher


def test_incomplete_flags(tmp_path):
    done = run("main.py", *COMMON, f"--workdir={tmp_path}", "--num_processes=2", code=2)
    assert "--coordinator_address, --process_id missing" in done.stderr
