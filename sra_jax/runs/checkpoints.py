"""Checkpoints of a run: orbax, asynchronous, one item per concern, each step whole or not there at all.

    <workdir>/checkpoints/<step>/{params, ema, opt_state, meta}

`meta` is JSON: the config, the step and the position in the data. Tools read single items.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sra_jax.distributed import processes
from sra_jax.errors import UserError
from sra_jax.runs import TREES
from sra_jax.runs.state import TrainState


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder.
      keep: how many of the newest are kept; None keeps all.
      read_only: for tools: nothing is created, cleaned up or deleted.
    """

    def __init__(self, workdir: Path, keep: int | None = None, read_only: bool = False):
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, read_only=read_only, create=not read_only, cleanup_tmp_directories=not read_only
        )
        self._open()

    def _open(self) -> None:
        self._manager = ocp.CheckpointManager(self.directory, options=self._options, item_names=(*TREES, "meta"))

    def steps(self) -> list[int]:
        """Steps that are saved, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Save in the background; returns as soon as the arrays are copied off the devices.

        Args:
          state: its `step` names the checkpoint.
          meta: JSON data kept beside it.
        """
        step = int(state.step)
        trees = {name: ocp.args.StandardSave(getattr(state, name)) for name in TREES}
        self._manager.save(step, args=ocp.args.Composite(**trees, meta=ocp.args.JsonSave(dict(meta))))

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step`, laid out as `abstract` says (shapes, types and shardings), and its meta data.

        Raises:
          Exception: whatever orbax raises where the files are damaged.
        """
        trees = {name: ocp.args.StandardRestore(getattr(abstract, name)) for name in TREES}
        with self._reader() as reader:
            restored = reader.restore(step, args=ocp.args.Composite(**trees, meta=ocp.args.JsonRestore()))
        number = jax.make_array_from_callback(  # `device_put` would ask the other processes
            (), abstract.step.sharding, lambda _: np.asarray(step, abstract.step.dtype)
        )
        state = TrainState(step=number, **{name: restored[name] for name in TREES})
        return state, restored["meta"]

    def _reader(self) -> ocp.CheckpointManager:
        """A manager of this process alone: reading waits for no other process, which may have failed to read."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
        )
        options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
        return ocp.CheckpointManager(self.directory, options=options, item_names=(*TREES, "meta"))

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any], list[str]] | None:
        """The newest checkpoint that can be read, or None where there is none.

        A damaged one is moved to <workdir>/damaged_checkpoints, so that its step can be saved again, and the one
        before it is tried. A checkpoint counts as damaged for all processes where one of them cannot read its part.

        Returns:
          The state, its meta data, and a message for each damaged checkpoint.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        messages: list[str] = []
        steps = self.steps()
        for step in reversed(steps):
            try:
                state, meta = self.restore(abstract, step)
                reason = ""
            except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            if not processes.all_agree(not reason):
                reason = reason or "another process could not read its part"
                messages.append(f"checkpoint {self.directory / str(step)} is damaged ({reason})")
                continue
            if messages:
                self._manager.close()
                for damaged in [s for s in steps if s > step]:
                    self._set_aside(damaged)
                processes.wait_for_all("damaged checkpoints")
                self._open()
            return state, meta, messages
        if steps:
            raise UserError(
                "no checkpoint can be read: " + "; ".join(messages) + ". Restore a copy, or start anew in another "
                "--workdir"
            )
        return None

    def restore_item(self, name: str, abstract: Any, step: int) -> Any:
        """One item of a checkpoint alone: params or ema.

        Raises:
          UserError: it cannot be read, or its shapes are not those of `abstract`.
        """
        try:
            wanted = ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)})
            return self._manager.restore(step, args=wanted)[name]
        except Exception as error:
            raise UserError(
                f"{name} of checkpoint {self.directory / str(step)} cannot be read: {str(error)[:500]}"
            ) from error

    def choose(self, step: int | None) -> int:
        """`step`, or the newest where it is None.

        Raises:
          UserError: it does not exist; the message lists those that do.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoints in {self.directory}; train first, or check --workdir")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"--step={step} is not saved in {self.directory}; there are {', '.join(map(str, steps))}")
        return step

    def wait(self) -> None:
        """Until the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release the background threads."""
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        if jax.process_index() != 0:
            return
        folder = self.directory.parent / "damaged_checkpoints"
        folder.mkdir(exist_ok=True)
        target = folder / str(step)
        copies = 1
        while target.exists():
            copies += 1
            target = folder / f"{step}_{copies}"
        os.replace(self.directory / str(step), target)
