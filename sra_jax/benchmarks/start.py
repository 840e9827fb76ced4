"""What tracing and compiling take at the first start of a command and at the second, which finds compiled programs."""

import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.errors import RunError

EVENTS = "/jax/core/compile/"
"""JAX's events of tracing, lowering and compiling; taking a kept program is part of the last."""

STARTS = ("first", "second")
SAMPLES = 16


class Clock:
    """Wall and CPU seconds of all threads, from the beginning of the outermost event to its end, summed up."""

    def __init__(self) -> None:
        import jax.monitoring

        self.wall = self.cpu = 0.0
        self._depth = 0
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)

    def _begin(self, event: str, *_: Any, **__: Any) -> None:
        if event.startswith(EVENTS):
            if not self._depth:
                self._since = time.perf_counter(), time.process_time()
            self._depth += 1

    def _end(self, event: str, *_: Any, **__: Any) -> None:
        if event.startswith(EVENTS) and self._depth:
            self._depth -= 1
            if not self._depth:
                self.wall += time.perf_counter() - self._since[0]
                self.cpu += time.process_time() - self._since[1]


def train(config_json: str, workdir: str) -> None:
    """What main.py does."""
    from sra_jax.training import loop

    loop.train(config_lib.from_json(config_json), Path(workdir))


def sample(config_json: str, workdir: str) -> None:
    """What tools/sample.py does, but for its files."""
    from sra_jax.runs.trained import TrainedModel
    from sra_jax.sampling.generation import generator_of

    model = TrainedModel(Path(workdir), sampling={})
    for _ in generator_of(model, SAMPLES, seed=0).images(model.params, SAMPLES, "balanced"):
        pass


def _work(job: Callable[[str, str], None], config_json: str, workdir: str, connection: Any) -> None:
    """In a process of its own: do the job and send what its programs took."""
    logging.set_verbosity(logging.FATAL)
    clock = Clock()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        job(config_json, workdir)
    connection.send({"wall_seconds": clock.wall, "cpu_seconds": clock.cpu})


@contextlib.contextmanager
def _environment(cache: str) -> Iterator[None]:
    """As a user's shell that keeps compiled programs in a folder of this measurement's own."""
    before = os.environ.copy()
    for name in [name for name in os.environ if "COMPILATION_CACHE" in name or "PERSISTENT_CACHE" in name]:
        del os.environ[name]
    os.environ["SRA_JAX_CACHE"] = cache
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def measured(job: Callable[[str, str], None], config_json: str, workdir: str, cache: str) -> Mapping[str, float]:
    """Wall and CPU seconds of tracing and compiling in a process that does a job.

    Raises:
      RunError: the process failed; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with _environment(cache):
        process = context.Process(target=_work, args=(job, config_json, workdir, theirs))
        process.start()  # with the environment of this moment
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise RunError(f"{job.__name__} failed in the process that was measured: see above") from error
    finally:
        process.join()


def starts(config: ConfigDict) -> dict[str, dict[str, Mapping[str, float]]]:
    """Of training a recipe, then of sampling from it: the first start and the second, each in a process of its own.

    Both train from the beginning, in folders of their own, and share a folder of compiled programs that is empty at
    first. Recipes that are told captions are not sampled from: prompts need a text tower's weights.
    """
    text = config_lib.to_json(config)
    found: dict[str, dict[str, Mapping[str, float]]] = {"train": {}}
    with tempfile.TemporaryDirectory() as folder:
        for start in STARTS:
            found["train"][start] = measured(train, text, f"{folder}/{start}", f"{folder}/cache")
        if not config_lib.tells_captions(config):
            found["sample"] = {
                start: measured(sample, text, f"{folder}/first", f"{folder}/cache") for start in STARTS
            }  # fmt: skip
    return found


def table(recipes: Sequence[ConfigDict], note: Callable[[str], None]) -> dict[str, Any]:
    """`starts` of recipes; "markdown" is the table."""
    rows: dict[str, Any] = {}
    lines = ["| recipe | command | first start | second start | CPU of the second over the first |", "|" + " --- |" * 5]
    for config in recipes:
        rows[config.name] = starts(config)
        for command, pair in rows[config.name].items():
            first, second = (pair[start] for start in STARTS)
            cells = [f"{one['wall_seconds']:.1f} s, CPU {one['cpu_seconds']:.1f} s" for one in (first, second)]
            cells += [f"{second['cpu_seconds'] / first['cpu_seconds']:.2f}"]
            lines.append(f"| {config.name} | {command} | {' | '.join(cells)} |")
            note(lines[-1])
    return {"recipes": rows, "markdown": lines}
