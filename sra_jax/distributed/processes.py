"""Several processes of one run: how they find each other, how they learn of a preemption, how they end.

A process on its own needs nothing of this and starts no service.
"""

import contextlib
import glob
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from sra_jax import cli, files, remote
from sra_jax.errors import Interrupted, Preempted, RunError, UserError

HEARTBEAT_SECONDS = 300
JOIN_SECONDS = 300

SAY_SECONDS = 60
"""After so long it is said which process the others wait for."""

BEAT_SECONDS = 5
"""How often a process shows the others that it lives."""

AGAIN = "Start all of them with the same command again: the run goes on from its newest checkpoint"

JAX_LATER_SECONDS = 60
"""JAX notices a lost process, too, but ends the others without a word of which it was: so it is to be later."""


def define_flags() -> None:
    """Flags of commands that run as several processes; none is needed where JAX detects the cluster itself."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where nothing else tells it.")
    cli.whole_flag("num_processes", None, "How many processes run this command together.", 1, 100_000)
    cli.whole_flag("process_id", None, "Which of them this is, from 0.", 0, 99_999)
    cli.whole_flag(
        "heartbeat_seconds", HEARTBEAT_SECONDS,
        "A process that is silent for so long is taken for dead, and the others end; they say which one they wait for "
        "after a minute, or half of it.", 1, 86_400,
    )  # fmt: skip


def detect(environment: Mapping[str, str]) -> str | None:
    """The launcher that started this process as one of several, by the variables that it sets; None for none.

    JAX finds out the rest itself: `jax.distributed.initialize` knows SLURM, Open MPI, mpi4py, Kubernetes and TPU pods.
    """

    def several(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return "JAX_COORDINATOR_ADDRESS"
    if several("SLURM_STEP_NUM_TASKS"):  # set by srun; a shell inside an allocation has SLURM_NTASKS only
        return "SLURM"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if several("PMI_SIZE"):
        return "MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU pod"
    if environment.get("KUBERNETES_SERVICE_HOST") and environment.get("JOB_COMPLETION_INDEX"):
        return "Kubernetes"
    if _on_a_tpu_machine(environment):
        return "TPU machine"
    return None


def _on_a_tpu_machine(environment: Mapping[str, str]) -> bool:
    """A TPU is attached and JAX may use it; whether it is part of a pod is then asked of the cloud."""
    allowed = environment.get("JAX_PLATFORMS", "tpu").split(",")
    attached = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return "tpu" in allowed and attached and importlib.util.find_spec("libtpu") is not None


def _check_flags(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raises a `UserError` for an address without a port, or a process that is none of those."""
    if coordinator_address is not None:
        host, _, port = coordinator_address.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65_535):
            raise UserError(
                f"--coordinator_address={coordinator_address} must be HOST:PORT with a port from 1 to 65535, such as "
                "10.0.0.1:1234"
            )
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id} is none of --num_processes={num_processes}: they count from 0 to "
            f"{num_processes - 1}"
        )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be one of the run's processes: to be entered before JAX is used, left after the last checkpoint.

    Raises:
      UserError: the flags are incomplete, or the other processes did not come.
    """
    given = {name: flags.FLAGS[name].value for name in ("coordinator_address", "num_processes", "process_id")}
    _check_flags(**given)
    launcher = detect(os.environ)
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3 and launcher is None:
        raise UserError(
            f"--{', --'.join(missing)} missing: outside of TPU pods, SLURM, MPI and Kubernetes all of "
            "--coordinator_address=HOST:PORT, --num_processes and --process_id are needed"
        )
    if len(missing) == 3 and launcher is None:
        yield
        return
    heartbeat = flags.FLAGS.heartbeat_seconds
    options: dict[str, Any] = {"cluster_detection_method": "mpi4py"} if launcher == "MPI" else {}
    if not missing:
        options["cluster_detection_method"] = "deactivate"
    where = given["coordinator_address"] or "the coordinator"
    patience = threading.Timer(SAY_SECONDS, lambda: print(
        f"still waiting for other processes to come to {where}, {JOIN_SECONDS} seconds at most", file=sys.stderr
    ))  # fmt: skip
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **given, **options, initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=heartbeat + JAX_LATER_SECONDS, shutdown_timeout_seconds=heartbeat,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"joining the other processes failed ({launcher or 'by flags'}): {str(error).splitlines()[0][:300]}; check "
            "that all are started and can reach --coordinator_address"
        ) from error
    finally:
        patience.cancel()
    try:
        yield
    except (Preempted, Interrupted):  # on all of them at the same step
        jax.distributed.shutdown()
        raise
    except BaseException:
        cli.end_at_once()  # the others may be gone, or wait for this one: see `Watch`
        raise
    jax.distributed.shutdown()


def wait_for_all(name: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(fine: bool) -> bool:
    """Whether it is fine on every process."""
    if jax.process_count() == 1:
        return fine
    return bool(multihost_utils.process_allgather(jax.numpy.asarray(fine)).all())


class Watch:
    """Says which process the others wait for, and ends them where it does not come back.

    A collective operation waits for a process that is stopped, and often for one that is gone, without a word. Each
    process therefore touches a file of its own in a folder that all of them see, and looks at those of the others. As a
    context manager it does so until the block ends; what ended the block is told to the others.

    Args:
      folder: is made where it does not exist. A process on its own makes none.
      seconds: silence after which a process is taken for dead; by default --heartbeat_seconds.
    """

    def __init__(self, folder: Path, seconds: float | None = None):
        self._folder, self._me, self._count = remote.path(folder), jax.process_index(), jax.process_count()
        self._ended = threading.Event()
        if self._count > 1:
            self._seconds = flags.FLAGS.heartbeat_seconds if seconds is None else seconds
            self._watched = [index for index in range(self._count) if index != self._me]
            if remote.is_address(self._folder) and self._me:
                self._watched = [0]  # each request to a bucket costs: process 0 looks at all, the others at it

    def __enter__(self) -> "Watch":
        if self._count > 1:
            if not remote.is_address(self._folder):
                self._folder.mkdir(exist_ok=True)
            self._write(None)
            wait_for_all("watch")  # no file is of an earlier run after this
            threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if self._count == 1 or error is None or isinstance(error, Preempted | Interrupted):
            self._ended.set()
            return
        lost = self._lost() if isinstance(error, jax.errors.JaxRuntimeError) else None
        self._ended.set()
        reason = (str(error).splitlines() or [kind.__name__])[0]
        self._write(reason)
        if lost:
            raise RunError(f"{lost}, and what the processes do together failed ({reason[:200]}). {AGAIN}") from error

    def _lost(self) -> str | None:
        """Which process is gone or stands still, if one is; it takes some beats to see."""
        for _ in range(3):
            time.sleep(BEAT_SECONDS)
            with contextlib.suppress(OSError):
                now = files.modified(self._folder / str(self._me))
                for name, silent, ended in self._others(now):
                    if ended is not None:
                        return f"{name} has ended: {ended}"
                    if silent > 2 * BEAT_SECONDS:
                        return f"{name} has been silent for {silent:.0f} seconds"
        return None

    def _others(self, now: float) -> list[tuple[str, float, str | None]]:
        return [self._state(index, now) for index in self._watched]

    def _write(self, ended: str | None) -> None:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "ended": ended}
        files.write_text(self._folder / str(self._me), json.dumps(record))

    def _look(self) -> None:
        own, said = self._folder / str(self._me), 0.0
        while not self._ended.wait(BEAT_SECONDS):
            try:
                files.touch(own)
                now = files.modified(own)  # by the clock of whoever stamps the files
                others = self._others(now)
            except OSError:
                continue  # a file system that is away for a moment
            name, silent, ended = max(others, key=lambda other: (other[2] is not None, other[1]))
            if ended is not None:
                self._ended.wait(2 * BEAT_SECONDS)  # whoever failed alike says so itself
                self._end(f"{name} has ended: {ended}")
            elif silent >= self._seconds:
                self._end(f"{name} was silent for {silent:.0f} seconds (--heartbeat_seconds={self._seconds})")
            elif silent >= min(SAY_SECONDS, self._seconds / 2) and now - said >= SAY_SECONDS:
                said = now
                print(
                    f"\nwaiting for {name}, which has been silent for {silent:.0f} seconds; this ends at "
                    f"{self._seconds}", file=sys.stderr, flush=True,
                )  # fmt: skip

    def _state(self, index: int, now: float) -> tuple[str, float, str | None]:
        """A process by name, the seconds of its silence, and what ended it."""
        path = self._folder / str(index)
        record = json.loads(files.read_text(path))
        return f"process {index} (pid {record['pid']} on {record['host']})", now - files.modified(path), record["ended"]

    def _end(self, why: str) -> None:
        if self._ended.is_set():
            return
        print(f"\nerror: {why}; process {self._me} ends, too. {AGAIN}", file=sys.stderr, flush=True)
        os._exit(cli.EXIT_FAILED)


class Preemption:
    """Notices that this run is to end: SIGTERM or Ctrl-C, on several processes of any of them.

    As a context manager it takes over SIGTERM and Ctrl-C; a second signal ends the process at once. Until `begin` there
    is nothing to save, and the first signal ends it, too.
    """

    def __init__(self) -> None:
        self._told: int | None = None
        self._working = False
        self._alone = jax.process_count() == 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        # SIGTERM to one of several is heard by JAX's own service, which tells the others.
        for number in (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,):
            if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on a step is finished and saved first."""
        self._working = True

    def _hear(self, number: int, _: Any) -> None:
        self._told = number
        signal.signal(number, self._before[number])
        if not self._working:  # what ends one of several alone is told to the others by `Watch`
            raise self.notice("no step was made yet") if self._alone else KeyboardInterrupt
        if number == signal.SIGINT:
            print("\nfinishing the step and saving; Ctrl-C once more ends at once", file=sys.stderr)
            if not self._alone:
                os.kill(os.getpid(), signal.SIGTERM)

    def due(self, step: int) -> bool:
        """Whether to save now and end, the same step on every process; to be asked after every step."""
        return self._told is not None if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def notice(self, state: str) -> Exception:
        """What to raise, with a word on what is saved."""
        if self._told == signal.SIGINT:
            return Interrupted(f"interrupted: {state}; the same command goes on from there")
        return Preempted(f"told to make room: {state}; start the same command again")
