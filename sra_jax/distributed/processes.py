"""Several processes of one run: how they find each other, how they learn of a preemption, how they end.

A process on its own needs nothing of this and starts no service.
"""

import contextlib
import glob
import importlib.util
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from sra_jax import cli
from sra_jax.errors import UserError

HEARTBEAT_SECONDS = 60
JOIN_SECONDS = 300


def define_flags() -> None:
    """Flags of commands that run as several processes; none is needed where JAX detects the cluster itself."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where nothing else tells it.")
    cli.whole_flag("num_processes", None, "How many processes run this command together.", 1, 100_000)
    cli.whole_flag("process_id", None, "Which of them this is, from 0.", 0, 99_999)
    cli.whole_flag(
        "heartbeat_seconds", HEARTBEAT_SECONDS,
        "A process that is silent for so long is taken for dead, and the others end.", 1, 86_400,
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
    try:
        jax.distributed.initialize(
            **given, **options, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"joining the other processes failed ({launcher or 'by flags'}): {str(error).splitlines()[0][:300]}; check "
            "that all are started and can reach --coordinator_address"
        ) from error
    yield
    jax.distributed.shutdown()  # after an error the others are gone, or learn of it by the heartbeat


def wait_for_all(name: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(fine: bool) -> bool:
    """Whether it is fine on every process."""
    if jax.process_count() == 1:
        return fine
    return bool(multihost_utils.process_allgather(jax.numpy.asarray(fine)).all())


class Preemption:
    """Notices that this run is to make room: SIGTERM, or on several processes JAX's notice of it to any of them.

    As a context manager it takes over SIGTERM; a second SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self._told = False
        self._alone = jax.process_count() == 1
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if self._alone:  # elsewhere JAX's own service listens
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, *_: Any) -> None:
        self._told = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def due(self, step: int) -> bool:
        """Whether to save now and end, the same step on every process; to be asked after every step."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)
