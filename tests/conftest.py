"""Eight simulated devices for the whole suite, and the project's commands run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()  # grain's worker processes read their options there

ROOT = Path(__file__).resolve().parents[1]

TINY_DIGITS = (
    "--config=configs/digits.py", "--config.model.width=32", "--config.model.depth=3", "--config.model.heads=2",
    "--config.alignment.student_block=1", "--config.alignment.teacher_block=2", "--config.batch_size=16",
    "--config.steps=24", "--config.optimizer.warmup_steps=0", "--config.log_every=4", "--config.checkpoint_every=6",
    "--config.sample_every=0", "--config.ema.decay=0.8", "--config.sampling.steps=4",
    "--config.sampling.preview_per_class=2",
)  # fmt: skip
"""The digits recipe at a size that trains in a second after compilation."""


def command_environment(devices: int = 1) -> dict[str, str]:
    """The environment of a user's shell, with so many simulated devices."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return environment


def start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    """`python *arguments` from the project's root, running."""
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=command_environment(devices), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(
    *arguments: str, devices: int = 1, code: int = 0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`python *arguments` from the project's root, with more variables if need be; its exit code is checked."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=command_environment(devices) | dict(environment or {}),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The workdir of a finished tiny run on the digits, with a preview at its last step. Read only."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    run("main.py", *TINY_DIGITS, "--config.sample_every=24", f"--workdir={workdir}")
    return workdir
