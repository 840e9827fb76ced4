"""Metrics of a run to Weights & Biases, for those who have its package; nothing else needs it."""

import importlib.util
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sra_jax import files, remote
from sra_jax.errors import UserError

FILE = "wandb.json"


def check(project: str) -> None:
    """Raises a `UserError` where a project is named and the package is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb={project!r} needs the package wandb: pip install wandb, or leave log.wandb empty "
            "(metrics.jsonl and tensorboard/ hold the same)"
        )


class Writer:
    """One run of a project; a resumed workdir goes on in the same.

    Args:
      project: its name.
      name: the run's, as it is shown.
      workdir: where the run's id is kept.
      config: the recipe, as JSON data.
    """

    def __init__(self, project: str, name: str, workdir: Path, config: Mapping[str, Any]):
        import wandb

        path = workdir / FILE
        if not path.exists():
            files.write_text(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        self._wandb = wandb
        self._run = wandb.init(
            project=project, name=name, id=json.loads(files.read_text(path))["id"], resume="allow",
            dir=None if remote.is_address(workdir) else str(workdir), config=dict(config),
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H,W,C) uint8."""
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Send what is not sent yet."""
        self._run.finish()
