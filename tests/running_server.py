"""Starts the project's commands for the tests without the seconds that their imports take.

    python tests/running_server.py FD

imports everything that commands import, once, and then forks for each request that comes through the socket with
that file descriptor. What was forked goes on as `python SCRIPT FLAGS` would: its own arguments, environment, folder,
output, signals and exit code, its own JAX (no backend exists before the fork). Ends with the other end of the socket.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUEST_BYTES = 1 << 20
LIBRARIES = ("tensorboard.summary.writer.record_writer",)
"""What the project imports only where it needs it, and most commands do."""


def preload() -> None:
    """Import all that commands may need, the whole project with it; `sys.path` stays as a command finds it."""
    sys.path.insert(0, str(ROOT))
    import sra_jax

    for module in pkgutil.walk_packages(sra_jax.__path__, "sra_jax."):
        if not module.name.startswith("sra_jax.benchmarks."):  # which compare with packages that need not be there
            importlib.import_module(module.name)
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.path.remove(str(ROOT))
    gc.collect()
    gc.freeze()  # what is loaded by now is never collected, so its pages stay shared


def serve(requests: socket.socket) -> list[str]:
    """Fork for each request: returns the command line in the forked process, never in this one.

    A request is JSON with `arguments`, `environment` and `folder`, and three file descriptors: output, errors, and
    the one to which go the process's id and, when it ends, its exit code (negative for a signal), a line each.
    """
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    reports: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            while reports:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                report = reports.pop(pid)
                os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
                os.close(report)
        if requests not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, REQUEST_BYTES, 3)
        if not message:
            sys.exit()
        output, errors, report = descriptors
        request = json.loads(message)
        pid = os.fork()
        if pid:
            os.write(report, f"{pid}\n".encode())
            reports[pid] = report
            os.close(output)
            os.close(errors)
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        requests.close()
        for descriptor in (wake, woken, report, *reports.values()):
            os.close(descriptor)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (errors, 2)):
            os.dup2(source, target)
            os.close(source)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return request["arguments"]


def main() -> int:
    """Run the script of `sys.argv` to its end: its exit code."""
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def finish(code: int) -> None:
    """End this process as Python does, but for taking its thousands of modules apart, which takes a second."""
    threading._shutdown()  # waits for threads; multiprocessing ends its forked processes in the same way
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    preload()
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.orig_argv = [sys.executable, *sys.argv]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    finish(main())
