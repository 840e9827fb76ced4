"""Metrics of a run to Weights & Biases, for those who have its package; nothing else needs it."""

import contextlib
import importlib.util
import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sra_jax import files, remote
from sra_jax.errors import UserError

FILE = "wandb.json"
OFFLINE = "WANDB_MODE=offline keeps all in the workdir for `wandb sync`; metrics.jsonl holds it without log.wandb, too"


def check(project: str) -> None:
    """Raises a `UserError` where a project is named and the package is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb={project!r} needs the package wandb: pip install wandb, or leave log.wandb empty "
            "(metrics.jsonl and tensorboard/ hold the same)"
        )


def check_account(project: str) -> None:
    """Raises a `UserError` where the project's run would be sent and nobody is logged in; a terminal is asked first."""
    if not project:
        return
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise UserError(f"log.wandb={project!r}: {_first_line(error)} {OFFLINE}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Writer:
    """One run of a project; a resumed workdir goes on in the same.

    What its service cannot do, once it has begun, is said once and never ends the training.

    Args:
      project: its name.
      name: the run's, as it is shown.
      workdir: where the run's id is kept.
      config: the recipe, as JSON data.

    Raises:
      UserError: the service refuses or does not answer, or the file of the id is none.
    """

    def __init__(self, project: str, name: str, workdir: Path, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        self._gone = False
        try:
            self._run = wandb.init(
                project=project, name=name, id=_run_id(workdir / FILE), resume="allow",
                dir=None if remote.is_address(workdir) else str(workdir), config=dict(config),
            )  # fmt: skip
        except wandb.Error as error:
            raise UserError(f"log.wandb={project!r}: {_first_line(error)}. {OFFLINE}") from error
        self._first = self._run.step  # that it does not have yet

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        """Raises nothing of the service."""
        try:
            yield
        except Exception as error:  # the package raises many kinds where its own process is gone
            self._gone = True
            print(
                f"warning: Weights & Biases takes no more of this run ({_first_line(error)}); training goes on, and "
                "metrics.jsonl holds all", file=sys.stderr,
            )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step.

        Steps up to the last one that the service has of this run are left out: it refuses them, and a run that goes on
        from an earlier checkpoint makes the same again.
        """
        if not self._gone:
            with self._sending():
                self._log(step, dict(values))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H,W,C) uint8; as `write`."""
        if not self._gone:
            with self._sending():
                self._log(step, {name: self._wandb.Image(picture)})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._first:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Send what is not sent yet."""
        if not self._gone:
            with self._sending():
                self._run.finish()


def _run_id(path: Path) -> str:
    """The id in the workdir's file, which is made where there is none."""
    if not files.exists(path):
        files.write_text(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
    try:
        return str(json.loads(files.read_text(path))["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no id of a run of Weights & Biases: move it away to begin a new one") from error
