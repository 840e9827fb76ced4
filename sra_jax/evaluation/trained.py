"""A trained model as the tools use it: config, one parameter tree of one checkpoint, devices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from sra_jax import config as config_lib
from sra_jax.data import registry as datasets
from sra_jax.errors import UserError
from sra_jax.evaluation.generation import Generator
from sra_jax.training import sharding
from sra_jax.training.checkpoints import Checkpoints
from sra_jax.training.loop import CONFIG
from sra_jax.training.state import Networks, Params


class TrainedModel:
    """One checkpoint of a run, on all devices of this process's JAX.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None takes the newest.
      weights: "ema" or "params".
      sampling: values that replace those of the config's `sampling` section.

    Attributes:
      config: the run's config with the replaced values.
      step: the checkpoint's.
      mesh: all devices.
      networks: functions of `params`.
      params: {"model": ...} and, where it was trained, "head".

    Raises:
      UserError: no such run or checkpoint, or sampling values that cannot work.
    """

    def __init__(
        self, workdir: Path, step: int | None = None, weights: str = "ema", sampling: Mapping[str, Any] | None = None
    ):
        workdir = Path(workdir)
        self._workdir, self._weights = workdir, weights
        self.config = config_lib.read(workdir / CONFIG)
        with self.config.unlocked():
            with self.config.sampling.ignore_type():  # DDPM's steps are a number or a list of sections
                self.config.sampling.update(sampling or {})
            self.config.mesh.update(data=-1, fsdp=1, model=1)  # the run's own mesh may have been a pod
            self.config.accumulation = 1
            self.config.batch_size = jax.device_count()
        config_lib.check(self.config, jax.device_count())
        self.mesh = sharding.make_mesh(config_lib.mesh_shape(self.config, jax.device_count()))
        self.networks = Networks(self.config)
        checkpoints = Checkpoints(workdir, read_only=True)
        try:
            self.step = checkpoints.choose(step)
            self.params: Params = checkpoints.restore_item(weights, self._abstract(), self.step)
        finally:
            checkpoints.close()

    def _abstract(self) -> Params:
        shapes = jax.eval_shape(self.networks.init, jax.random.key(0))
        layout = sharding.state_shardings(shapes, self.mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint and tree apart from any other, as JSON data."""
        folder = self._workdir.absolute() / "checkpoints" / str(self.step)
        metadata = folder / "_CHECKPOINT_METADATA"  # orbax writes the moment of the save into it
        return {
            "path": str(folder), "weights": self._weights,
            "saved": metadata.read_text() if metadata.exists() else "", "model": self.config.model.to_dict(),
        }  # fmt: skip

    def generator(self, batch_size: int, seed: int) -> Generator:
        """Images from this model with its config's sampler and guidance."""
        return Generator(self.config, self.mesh, datasets.decoder(self.config.data), batch_size, seed)


def define_sampling_flags() -> None:
    """Flags of every tool that samples; each replaces the run's own value."""
    flags.DEFINE_string("sampler", None, "Sampler of the run's family, such as sde, ode or heun; default: the run's.")
    flags.DEFINE_string("sampling_steps", None, "Steps of the sampler; default: the run's.")
    flags.DEFINE_float("guidance_scale", None, "At least 1; 1 turns guidance off; default: the run's.")
    flags.DEFINE_float("eta", None, "DDIM's share of noise, 0 (deterministic) to 1 (as DDPM); default: the run's.")
    flags.DEFINE_list(
        "guidance_interval", None, "Guide where low <= t <= high, fractions of the time range; default: the run's."
    )
    flags.DEFINE_integer("guidance_channels", None, "Guide the first so many channels; 0: all; default: the run's.")


def sampling_overrides() -> dict[str, Any]:
    """What the sampling flags replace in the config's `sampling` section.

    Raises:
      UserError: a value that cannot be read.
    """
    given = flags.FLAGS
    overrides: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("sampler", "guidance_scale", "guidance_channels", "eta")
        if getattr(given, name) is not None
    }
    if given.sampling_steps is not None:
        steps = given.sampling_steps
        overrides["steps"] = int(steps) if steps.lstrip("-").isdigit() else steps
    if given.guidance_interval is not None:
        try:
            low, high = (float(bound) for bound in given.guidance_interval)
        except ValueError as error:
            raise UserError(
                f"--guidance_interval={','.join(given.guidance_interval)} must be two numbers: low,high"
            ) from error
        overrides["guidance_interval"] = (low, high)
    return overrides


def parse_labels(text: str) -> str | Sequence[int]:
    """The --labels flag: a scheme's name, or class numbers with commas between."""
    parts = text.split(",")
    return [int(part) for part in parts] if all(part.strip().lstrip("-").isdigit() for part in parts) else text


def check_new_file(path: Path, overwrite: bool) -> None:
    """Raises `UserError` where `path` exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another name, or --overwrite to replace it")
