"""The project's commands run as a user runs them, but for the seconds of their imports.

`run` and `start` fork a process that has imported everything (running_server.py); with `fresh=True` they start Python
anew, as a user does. Each kind of command has a test that does so.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sra_jax import heap

ROOT = Path(__file__).resolve().parents[1]
SERVER = Path(__file__).with_name("running_server.py")
QUICK_COMPILING = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Tests compile much and compute little: this halves the former; fusions and layouts stay as they are."""

READ_AT_IMPORT = ("JAX_", "TF_", "GLIBC_", "OPENBLAS_", "OMP_", "LD_", "PYTHON", "MPL")
"""Variables that start so are read before a forked process can be given other ones: it takes a fresh one."""


_started = itertools.count()


class Command:
    """A running command that the server forked; what the tests need of `subprocess.Popen`."""

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str], folder: Path):
        self.args = (sys.executable, *arguments)
        self.returncode: int | None = None
        # Files, not pipes: a command that says much never waits for its reader.
        self._output, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        self._report, report = os.pipe()
        request = {"arguments": arguments, "environment": dict(environment), "folder": str(folder)}
        descriptors = [self._output.fileno(), self._errors.fileno(), report]
        try:
            socket.send_fds(_server()[0], [json.dumps(request).encode()], descriptors)
        finally:
            os.close(report)
        self.pid = int(self._line())

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._report, 1)
            assert byte, "the server of commands has ended"
            line += byte
        return line

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended; `subprocess.TimeoutExpired` after so many seconds."""
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._end()
        return self.returncode

    def _end(self) -> None:
        self.returncode = int(self._line())
        os.close(self._report)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Output and errors, once it has ended."""
        self.wait(timeout)
        return self._text(self._output), self._text(self._errors)

    @staticmethod
    def _text(file) -> str:
        file.seek(0)
        return file.read().decode()

    def send_signal(self, number: int) -> None:
        """As `os.kill`, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> tuple[socket.socket, dict[str, str]]:
    """The socket of the server, which ends with this process, and the variables that it imported everything with."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = command_environment()
    subprocess.Popen(
        [sys.executable, str(SERVER), str(theirs.fileno())], cwd=ROOT, env=_with_tuned_heap(environment),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
    )  # fmt: skip
    theirs.close()
    return ours, _imported(environment)


def _with_tuned_heap(environment: Mapping[str, str]) -> dict[str, str]:
    """With what main.py and the tools would otherwise restart themselves for."""
    return heap.tuned(environment) or dict(environment)


def _imported(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def command_environment(devices: int = 1) -> dict[str, str]:
    """The environment of a user's shell, with so many simulated devices."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment["XLA_FLAGS"] = f"{QUICK_COMPILING} --xla_force_host_platform_device_count={devices}"
    return environment


def compilation_cache() -> Path:
    """A folder for compiled programs: one for each version of JAX and each kind of processor, in the user's cache."""
    processor = {platform.machine()}
    with contextlib.suppress(OSError):  # a system without it
        processor |= {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")}
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
    key = hashlib.sha256(repr((versions, sorted(processor))).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sra_jax_tests" / key
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that may not be written to
        return Path(tempfile.mkdtemp(prefix="sra_jax_tests_"))
    return folder


def start(
    *arguments: str, devices: int = 1, environment: Mapping[str, str] | None = None, folder: Path = ROOT,
    fresh: bool = False,
) -> Command | subprocess.Popen:
    """`python *arguments`, running.

    Args:
      arguments: the command line; the script's path is taken from the project's root.
      devices: how many CPU devices it sees.
      environment: variables besides those of the tests.
      folder: where it runs.
      fresh: start Python anew. So does the first call of a session, which may be the only one; so do arguments that
        name no script, and variables that are read at an import.
    """
    variables = command_environment(devices) | dict(environment or {})
    script, *flags = arguments
    if folder != ROOT and script.endswith(".py"):
        script = str(ROOT / script)
    first = next(_started) == 0
    if fresh or first or not script.endswith(".py") or _imported(variables) != _server()[1]:
        return subprocess.Popen(
            [sys.executable, script, *flags], cwd=folder, env=variables, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    return Command((script, *flags), _with_tuned_heap(variables), folder)


def run(
    *arguments: str, devices: int = 1, code: int = 0, environment: Mapping[str, str] | None = None,
    folder: Path = ROOT, fresh: bool = False,
) -> subprocess.CompletedProcess:
    """`start` to its end, which has to come within ten minutes with the exit code `code`."""
    process = start(*arguments, devices=devices, environment=environment, folder=folder, fresh=fresh)
    try:
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == code, f"exit code {process.returncode}\n{output}\n{errors}"
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def kill_when(process: Command | subprocess.Popen, condition: Callable[[], bool]) -> None:
    """SIGKILL at the first moment at which `condition()` holds, which has to come before the command ends."""
    while not condition():
        assert process.poll() is None, "it ended before it could be killed: " + process.communicate()[1]
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
