"""Where the time of a run goes, and how much of the devices' arithmetic it uses."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.distributed.chips import peak_flops
from sra_jax.distributed.devices import peak_memory_bytes
from sra_jax.runs.metrics import GOODPUT, RUN_SECONDS

PARTS = ("data", "device", "saving", "logging")


class Clock:
    """Measures stretches of steps. The host runs ahead of the devices, so its waiting shows what the run waits for.

    Args:
      config: the run's.
      began: `time.perf_counter()` when this process began with the run.
      history: what the run had logged before this process, with the steps that are now done again.
      first: step from which this process goes on.
    """

    def __init__(self, config: ConfigDict, began: float, history: Sequence[Mapping[str, float]], first: int):
        self._batch_size = config.batch_size
        self._flops = config_lib.step_flops(config).total / jax.device_count()
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._began = began
        self._before = max((record.get(RUN_SECONDS, 0.0) for record in history), default=0.0)
        kept = [record for record in history if record["step"] <= first and RUN_SECONDS in record]
        self._useful = kept[-1][GOODPUT] * kept[-1][RUN_SECONDS] if kept else 0.0
        self._spent = dict.fromkeys(PARTS, 0.0)
        self.restart()

    def restart(self) -> None:
        """Begin a new stretch here: what came since the last `tick` was not training."""
        self._since = self._mark = time.perf_counter()
        self._steps, self._saved = 0, 0.0
        self._spent = dict.fromkeys(PARTS, 0.0) | {"logging": self._spent["logging"]}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as one of `PARTS`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - began

    def tick(self, steps: int) -> None:
        """So many steps more are known to be done."""
        now = time.perf_counter()
        self._useful += now - self._mark - (self._spent["saving"] - self._saved)
        self._mark, self._saved = now, self._spent["saving"]
        self._steps += steps

    def report(self) -> dict[str, float]:
        """Of the stretch until the last `tick`, as it is logged.

        Returns:
          `steps_per_second` and `examples_per_second`; `time/PART_seconds` a step: waiting for the next batch, waiting
          for the devices, saving, logging; `time/run_seconds` of all processes that this run had so far, and
          `time/goodput`, the share of it in steps that were kept; `device/tflops_per_second` of each device by the
          networks' analytic operations, `device/mfu` against its published bfloat16 rate where that is known, and
          `device/peak_memory_gb` where the device counts it.
        """
        elapsed = self._mark - self._since
        total = self._before + time.perf_counter() - self._began
        rate = self._flops * self._steps / elapsed
        found = {
            "steps_per_second": self._steps / elapsed,
            "examples_per_second": self._steps * self._batch_size / elapsed,
            **{f"time/{name}_seconds": seconds / self._steps for name, seconds in self._spent.items()},
            RUN_SECONDS: total,
            GOODPUT: self._useful / total,
            "device/tflops_per_second": rate / 1e12,
        }
        if self._peak:
            found["device/mfu"] = rate / self._peak
        if peak := peak_memory_bytes():
            found["device/peak_memory_gb"] = peak / 1e9
        self._spent["logging"] = 0.0
        return found
