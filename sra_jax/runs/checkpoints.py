"""Checkpoints of a run: orbax, asynchronous, one item per concern, each step whole or not there at all.

    <workdir>/checkpoints/<step>/{params, ema, opt_state, meta, checksums}, and profiles where further EMAs are tracked

`meta` is JSON: the config, the step and the position in the data. `checksums` are those of every array and of `meta`;
they are compared whenever something is read. Tools read single items.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from sra_jax import files, remote
from sra_jax.distributed import processes
from sra_jax.errors import RunError, UserError
from sra_jax.runs import CHECKSUMS, PROFILES, TREES, checksums
from sra_jax.runs.state import TrainState

ITEMS = (*TREES, PROFILES, "meta", CHECKSUMS)

T = TypeVar("T")

UNCHECKED = "was saved without checksums: damage in its arrays would go unnoticed"


def _trees(state: TrainState) -> dict[str, Any]:
    """What of a state makes an item of its own: the further EMAs only where there are some."""
    return {name: getattr(state, name) for name in (*TREES, *([PROFILES] if state.profiles else []))}


def check_place(flag: str, workdir: Path) -> None:
    """Raises a `UserError` where no run can be kept at an address."""
    if not remote.is_address(workdir) or remote.scheme(workdir) in remote.CHECKPOINTS:
        return
    allowed = " and ".join(f"{scheme}://" for scheme in remote.CHECKPOINTS)
    hint = ""
    if remote.scheme(workdir) == remote.HUB:
        hint = "; weights come in by tools/convert_checkpoint.py --checkpoint=hf://OWNER/NAME/FILE"
    raise UserError(f"{flag}={workdir}: runs are kept in local folders and at {allowed} (orbax's checkpoints){hint}")


def check_writable(flag: str, workdir: Path) -> None:
    """Raises a `UserError` where no run can be kept at an address, or it cannot be written."""
    check_place(flag, workdir)
    files.check_output(flag, workdir, folder=True)


class Damaged(Exception):
    """A checkpoint that one of the processes cannot read, or whose arrays are not those that were saved."""


class Unreadable(UserError):
    """An item of a checkpoint that is damaged, or of other shapes than asked for; `step` is the checkpoint's."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Found(NamedTuple):
    """What `Checkpoints.restore_newest` found.

    Attributes:
      state: the newest whole state.
      meta: its meta data.
      damaged: a message for each newer one that is damaged.
      checked: False for checkpoints of before there were checksums.
    """

    state: TrainState
    meta: dict[str, Any]
    damaged: list[str]
    checked: bool


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder.
      keep: how many of the newest are kept; None keeps all.
      keep_every: those of every so many steps are kept for good; 0: none.
      read_only: for tools: nothing is created, cleaned up or deleted.

    Raises:
      UserError: something else lies where the folder belongs.
    """

    def __init__(self, workdir: Path, keep: int | None = None, read_only: bool = False, keep_every: int = 0):
        self.directory = files.absolute(workdir) / "checkpoints"
        files.check_plain(self.directory, folder=True)
        kept: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
        if keep_every:
            kept.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept), read_only=read_only,
            create=not read_only, cleanup_tmp_directories=not read_only,
        )  # fmt: skip
        self._open()

    def _open(self) -> None:
        self._manager = ocp.CheckpointManager(self.directory, options=self._options, item_names=ITEMS)
        self._failed = False

    def steps(self) -> list[int]:
        """Steps that are saved, ascending."""
        return sorted(self._manager.all_steps())

    def newest(self) -> str:
        """What there is to go on from, in words."""
        steps = self.steps()
        if not steps:
            return "no checkpoint was saved before"
        return f"the newest whole checkpoint is step {steps[-1]} in {self.directory}"

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Save in the background; returns as soon as the arrays are copied off the devices.

        Args:
          state: its `step` names the checkpoint.
          meta: JSON data kept beside it.

        Raises:
          RunError: an array is not finite, and nothing is saved; or this or the save before cannot be written.
        """
        step = int(state.step)
        sums, infinite = {}, []
        trees = _trees(state)
        for name, tree in trees.items():
            sums[name], bad = checksums.arrays(tree)
            infinite += [f"{name}/{path}" for path in bad]
        if infinite:
            self.wait()
            raise RunError(
                f"{len(infinite)} array(s) hold NaN or infinity after step {step}, the first being {infinite[0]}: they "
                f"are not saved; {self.newest()}"
            )
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["meta"] = ocp.args.JsonSave(dict(meta))
        items[CHECKSUMS] = ocp.args.JsonSave({**sums, "meta": checksums.data(meta)})
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds where a disk is full or gone
            self._failed = True
            raise RunError(
                f"a checkpoint cannot be written: {_cause(error)}; {self.newest()}. Make room or mend the disk, and "
                "start the same command again"
            ) from error

    def check(self) -> None:
        """Raises `RunError` where the save in the background has failed; waits for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step`, laid out as `abstract` says (shapes, types and shardings), and its meta data.

        Raises:
          Damaged: it cannot be read, or is not what was saved.
        """
        trees = _trees(abstract)
        items, _ = self._load(trees, step, with_meta=True)
        number = jax.make_array_from_callback(  # `device_put` would ask the other processes
            (), abstract.step.sharding, lambda _: np.asarray(step, abstract.step.dtype)
        )
        return TrainState(step=number, **{name: items[name] for name in trees}), items["meta"]

    def _load(self, trees: Mapping[str, Any], step: int, with_meta: bool = False) -> tuple[dict[str, Any], bool]:
        """Items of a checkpoint, laid out as said, and whether their checksums could be compared.

        Raises:
          Damaged: on every process, where one of them cannot read its part or finds other arrays than were saved.
        """
        items: dict[str, Any] = {}
        with _agreed("another process could not read its part"):
            items, sums = self._read(trees, step, with_meta)
        with _agreed("another process found damage"):
            found = {name: checksums.arrays(items[name]) for name in trees}  # together, before any process may fail
            infinite = [f"{name}/{path}" for name, (_, bad) in found.items() for path in bad]
            wrong = [
                f"{name}/{path}"
                for name, (own, _) in found.items()
                if sums is not None
                for path in checksums.differences(sums[name], own)
            ]
            if with_meta and sums is not None and checksums.data(items["meta"]) != sums["meta"]:
                wrong.append("meta")
            if wrong:
                others = f" and {len(wrong) - 1} more" if wrong[1:] else ""
                raise ValueError(f"the checksum of {wrong[0]}{others} is not that of what was saved")
            if infinite:
                raise ValueError(f"{infinite[0]} holds NaN or infinity")
            if with_meta and items["meta"]["step"] != step:
                raise ValueError(f"it is of step {items['meta']['step']}")
        return items, sums is not None

    def _read(
        self, trees: Mapping[str, Any], step: int, with_meta: bool
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Items of a checkpoint, and the checksums; None where it was saved without them."""
        wanted = {name: ocp.args.StandardRestore(abstract) for name, abstract in trees.items()}
        folder = self.directory / str(step)
        for path in () if remote.is_address(folder) else folder.rglob("*"):
            if not path.is_dir():
                files.check_plain(path)  # reading a pipe would wait for ever
        with_sums = files.exists(folder / CHECKSUMS)
        for name, there in (("meta", with_meta), (CHECKSUMS, with_sums)):
            if there:
                wanted[name] = ocp.args.JsonRestore()
        with self._reader() as reader:
            restored = reader.restore(step, args=ocp.args.Composite(**wanted))
        return {name: restored[name] for name in wanted}, restored[CHECKSUMS] if with_sums else None

    def _reader(self) -> ocp.CheckpointManager:
        """A manager of this process alone: reading waits for no other process, which may have failed to read."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
        )
        options = ocp.CheckpointManagerOptions(create=False, read_only=True, multiprocessing_options=alone)
        return ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)

    def restore_newest(self, abstract: TrainState) -> Found | None:
        """The newest checkpoint that can be read, or None where there is none.

        A damaged one is moved to <workdir>/damaged_checkpoints, so that its step can be saved again, and the one
        before it is tried. A checkpoint counts as damaged for all processes where one of them cannot read its part.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        messages: list[str] = []
        steps = self.steps()
        for step in reversed(steps):
            try:
                state, meta = self.restore(abstract, step)
            except Damaged as damage:
                messages.append(f"checkpoint {self.directory / str(step)} is damaged ({damage})")
                continue
            checked = files.exists(self.directory / str(step) / CHECKSUMS)
            if messages:
                self._manager.close()
                for damaged in [s for s in steps if s > step]:
                    self._set_aside(damaged)
                processes.wait_for_all("damaged checkpoints")
                self._open()
            return Found(state, meta, messages, checked)
        if steps:
            raise UserError(
                "no checkpoint can be read: " + "; ".join(messages) + ". Restore a copy, or start anew in another "
                "--workdir"
            )
        return None

    def restore_item(self, name: str, abstract: Any, step: int) -> Any:
        """One item of a checkpoint alone: params, ema or profiles.

        Raises:
          Unreadable: it cannot be read, is not what was saved, or its shapes are not those of `abstract`.
        """
        try:
            items, checked = self._load({name: abstract}, step)
        except Damaged as damage:
            others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
            raise Unreadable(
                f"{name} of checkpoint {self.directory / str(step)} cannot be read: {damage}. Other steps that are "
                f"saved: {others}", step,
            ) from damage  # fmt: skip
        if not checked and jax.process_index() == 0:
            print(f"{self.directory / str(step)} {UNCHECKED}", file=sys.stderr)
        return items[name]

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

    def read(self, step: int | None, reading: Callable[[int], T]) -> tuple[int, T]:
        """What is read of `step` or, where it is None, of the newest that can be read, and which step that is.

        Where a newer one is damaged, that is said. Nothing is moved: the run sets it aside when it goes on.

        Args:
          step: as `choose` takes it.
          reading: reads items of a step, and raises `Unreadable`.

        Raises:
          UserError: there is no such step, it cannot be read, or none can.
        """
        if step is not None:
            return self.choose(step), reading(step)
        self.choose(None)  # raises where there is none
        failures: list[Unreadable] = []
        for saved in reversed(self.steps()):
            try:
                found = reading(saved)
            except Unreadable as error:
                if error.step != saved:  # an older one that it is made from
                    raise
                failures.append(error)
                continue
            if failures and jax.process_index() == 0:
                print(f"{failures[0]}. Step {saved} is used, the newest that can be read", file=sys.stderr)
            return saved, found
        raise failures[0]

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
          RunError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release the background threads.

        Raises:
          RunError: the last save could not be written, and nothing has said so yet.
        """
        with contextlib.suppress(Exception) if self._failed else self._writing():
            self._manager.close()

    def _set_aside(self, step: int) -> None:
        if jax.process_index() != 0:
            return
        folder = self.directory.parent / "damaged_checkpoints"
        target = folder / str(step)
        copies = 1
        while files.exists(target):
            copies += 1
            target = folder / f"{step}_{copies}"
        files.move_folder(self.directory / str(step), target)


@contextlib.contextmanager
def _agreed(elsewhere: str) -> Iterator[None]:
    """Every process does the same in the block; where it fails on one, all raise `Damaged`."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
        failure = error
    if not processes.all_agree(failure is None):
        raise Damaged(_cause(failure) if failure else elsewhere) from failure


def _cause(error: Exception) -> str:
    """An error in one line. What the system said is in the midst of tensorstore's long messages."""
    text = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return (text.splitlines() or [type(error).__name__])[0][:300]
