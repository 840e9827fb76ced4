"""The acceptance run of a machine: what it computes is right, and how fast it is.

Each part runs in a process of its own, one after the other, so that each has the accelerator to itself (a TPU belongs
to one process at a time, and JAX reserves a GPU's memory), and one that fails takes no other with it.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sra_jax import files, remote
from sra_jax.errors import UserError

Result = dict[str, Any]
"""Of a part: "rows", its lines of the table, each {"what", "measured", "passed"}, passed None where nothing is judged;
figures; "seconds"; "failed" in place of the rows where it could not be done."""

JSON, TABLE, UNFINISHED = "acceptance.json", "acceptance.md", "unfinished.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every part is told.

    Attributes:
      quick: sizes that a CPU works through in seconds; the figures say nothing of speed then.
      recipes: configs as JSON by what the table calls them; the first is the one that is sampled and measured beside
        PyTorch.
      root: the folder of main.py.
      batches: the batch that each recipe was measured with, once it is known.
    """

    quick: bool
    recipes: Mapping[str, str]
    root: str
    batches: Mapping[str, int] = dataclasses.field(default_factory=dict)


def row(what: str, measured: str, passed: bool | None = None) -> Result:
    """A line of the table."""
    return {"what": what, "measured": measured, "passed": passed}


PARTS: Mapping[str, str] = {
    "machine": "versions, devices, rate of a matrix product",
    "equality": "loss, gradients and ten steps against the CPU's in float32",
    "attention": "every implementation that can run, against the plain one, timed",
    "train_step": "a step with the recipe's method and without, at the largest batch that fits",
    "peer": "the same step in PyTorch, where it is installed",
    "sampler": "images a second",
    "networks": "encoding by the VAE, the FID Inception",
    "resume": "a run that is killed ends as one that was not",
}
"""Name -> what is done, in order; each is the function `measure_NAME` of sra_jax/benchmarks/acceptance_parts.py."""


class Unfinished:
    """The finished parts of a run that is not at its end, as a file in its folder: the same command goes on there.

    Args:
      output: the folder.
      settings: of the run.
      parts: that it does.
    """

    def __init__(self, output: Path, settings: Settings, parts: Sequence[str]):
        self._path = output / UNFINISHED
        self._made: dict[str, Any] = {
            "quick": settings.quick, "recipes": dict(settings.recipes), "parts": list(parts), "host": platform.node(),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        }  # fmt: skip

    def read(self, overwrite: bool) -> dict[str, Result]:
        """The results so far; none where there is no file, or one of another run and it may be replaced.

        Raises:
          UserError: the file is of another run and may not be replaced, or is none of a run.
        """
        if not files.exists(self._path):
            return {}
        try:
            kept = json.loads(files.read_text(self._path))
            results, made = dict(kept["results"]), dict(kept["made"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path} holds no parts of an acceptance run: move it away") from error
        changed = [name for name in self._made if made.get(name) != self._made[name]]
        if not changed:
            return results
        if overwrite:
            return {}
        raise UserError(
            f"{self._path} holds parts of a run with other {', '.join(changed)}: start that one again, give another "
            "--output, or --overwrite to replace it"
        )

    def write(self, results: Mapping[str, Result]) -> None:
        """Keep what is finished; a part that failed is done again."""
        kept = {name: result for name, result in results.items() if "failed" not in result}
        files.write_text(self._path, json.dumps({"made": self._made, "results": kept}, indent=2) + "\n")

    def remove(self) -> None:
        """All is finished."""
        if files.exists(self._path):
            remote.path(self._path).unlink()


def accept(
    settings: Settings, parts: Sequence[str], limit: float, say: Callable[[str], None],
    kept: Mapping[str, Result] | None = None, keep: Callable[[Mapping[str, Result]], None] = lambda _: None,
) -> dict[str, Result]:  # fmt: skip
    """Run the parts in turn.

    Args:
      settings: as the parts take them.
      parts: keys of `PARTS`.
      limit: seconds that a part may take; one that takes longer is ended and has failed.
      say: takes a line as each part begins and ends.
      kept: results of parts that need not be done again.
      keep: takes the results so far after each part.

    Returns:
      Name -> its result.
    """
    results: dict[str, Result] = {}
    with _compiled_once():
        for number, name in enumerate(parts, 1):
            if kept and name in kept:
                results[name] = kept[name]
                say(f"[{number}/{len(parts)}] {name}: was {_outcome(results[name])} before")
            else:
                say(f"[{number}/{len(parts)}] {name}: {PARTS[name]}")
                start = time.monotonic()
                results[name] = _in_process(name, settings, limit)
                results[name]["seconds"] = round(time.monotonic() - start, 1)
                say(f"[{number}/{len(parts)}] {name}: {_outcome(results[name])} ({results[name]['seconds']} s)")
                keep(results)
            if found := results[name].get("batches"):
                settings = dataclasses.replace(settings, batches=found)
    return results


@contextlib.contextmanager
def _compiled_once() -> Iterator[None]:
    """A folder for compiled programs that the parts' processes share, unless the user names one."""
    with tempfile.TemporaryDirectory(prefix="accept_cache_") as folder:
        ours = {
            "JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }  # fmt: skip
        added = {} if "JAX_COMPILATION_CACHE_DIR" in os.environ else ours
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


def _in_process(name: str, settings: Settings, limit: float) -> Result:
    with tempfile.TemporaryDirectory(prefix="accept_") as folder:
        path = Path(folder) / "result.json"
        context = multiprocessing.get_context("forkserver")  # libraries are loaded once, and no device is opened there
        context.set_forkserver_preload(["sra_jax.benchmarks.acceptance_parts"])
        process = context.Process(target=_part, args=(name, settings, str(path)))
        process.start()
        try:
            process.join(limit)
            if process.is_alive():
                return {"failed": f"took longer than {limit:.0f} s; give it more by --part_seconds"}
        finally:
            _end(process)
        if path.exists():
            return json.loads(path.read_text())
        if process.exitcode and process.exitcode < 0:
            ended = signal.Signals(-process.exitcode).name
            return {"failed": f"the process was ended by {ended}: out of memory, or a crash of a driver"}
        return {"failed": f"the process ended with code {process.exitcode} and no result; its messages are above"}


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """With all that it started."""
    if process.pid and process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it has no group before it has begun
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()


def _part(name: str, settings: Settings, path: str) -> None:
    """In the part's process: its result, or why there is none, as a file."""
    os.setpgrp()  # the terminal's Ctrl-C is for the parent, which ends this process and all that it started
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    result: Result
    try:
        from sra_jax.benchmarks import acceptance_parts

        result = getattr(acceptance_parts, f"measure_{name}")(settings)
    except UserError as error:
        result = {"failed": str(error)}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        lines = str(error).strip().splitlines() or [""]
        result = {"failed": f"{type(error).__name__}: {lines[0][:300]}"}
    files.write_text(Path(path), json.dumps(result))


def _end_with_parent() -> None:
    """However the parent ends, no part outlives it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def passed(result: Result) -> bool:
    """Whether a part was done, and nothing in it is wrong."""
    return "failed" not in result and all(row["passed"] is not False for row in result["rows"])


def _outcome(result: Result) -> str:
    if "failed" in result:
        return f"FAILED, {result['failed']}"
    return "done" if passed(result) else "done, and NOT ALL IS RIGHT"


def table(results: Mapping[str, Result]) -> str:
    """The results as a Markdown table."""
    words = {True: "yes", False: "**no**", None: ""}
    lines = ["| part | what | measured | right |", "| --- | --- | --- | --- |"]
    for name, result in results.items():
        rows = [row("", result["failed"], False)] if "failed" in result else result["rows"]
        for each in rows:
            cells = (name, each["what"], each["measured"], words[each["passed"]])
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
