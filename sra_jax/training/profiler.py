"""A trace of some steps for xprof, where a run is asked for one."""

import tempfile
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sra_jax import files, remote

FOLDER = "profile"


class Profiler:
    """Traces the steps `profile.start` to `profile.start + profile.steps` of a run.

    Args:
      config: the run's.
      folder: where the trace is written, as TensorBoard's profile plugin and xprof read it; may be an address.
    """

    def __init__(self, config: ConfigDict, folder: Path):
        start, steps = config.profile.start, config.profile.steps
        self._window = range(start, start + steps) if start else range(0)
        self._target = folder
        self._folder = str(folder)
        if self._window and remote.is_address(folder):
            self._folder = tempfile.mkdtemp(prefix="profile_")
        self._running = False

    def before(self, step: int) -> None:
        """To be called before step `step` (counted from 1) is dispatched."""
        if step in self._window and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: object) -> bool:
        """To be called once it is dispatched; whether the trace has been written, which takes some seconds."""
        if not self._running or step + 1 in self._window:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """End a trace that is being made."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            if remote.is_address(self._target):
                files.send_folder(self._folder, self._target)
                files.remove_folder(Path(self._folder))
