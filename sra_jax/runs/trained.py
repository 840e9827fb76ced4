"""A trained model as the tools use it: config, one parameter tree of one checkpoint, devices."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax import files, remote
from sra_jax.config.profiles import TEACHER
from sra_jax.distributed import compilation_cache, sharding
from sra_jax.distributed.devices import check_devices
from sra_jax.errors import UserError
from sra_jax.runs import CONFIG, class_names, profiles
from sra_jax.runs.checkpoints import Checkpoints, check_place
from sra_jax.runs.state import Networks, Params


class TrainedModel:
    """One checkpoint of a run, on all devices of this process's JAX.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None takes the newest that can be read.
      weights: "ema" or "params".
      sampling: values that replace those of the config's `sampling` section; None for who does not sample.
      ema: which EMA, as `profiles.restore` takes it.

    Attributes:
      workdir: the run's folder.
      config: the run's config with the replaced values.
      step: the checkpoint's.
      weights: "params", "ema" for the teacher's, or "ema NAME".
      mesh: all devices.
      networks: functions of `params`.
      params: {"model": ...} and, where it was trained, "head".
      class_names: one a label, or None where the run has none.

    Raises:
      UserError: no such run or checkpoint, or sampling values that cannot work.
    """

    def __init__(
        self, workdir: Path, step: int | None = None, weights: str = "ema", sampling: Mapping[str, Any] | None = None,
        ema: str = "",
    ):
        check_devices()
        workdir = remote.path(workdir)
        check_place("--workdir", workdir)
        if ema and weights != "ema":
            raise UserError(f"--ema={ema} names an EMA, and {weights} are asked for; leave out one of the two")
        self.workdir = workdir
        self._trained_with = config_lib.read(workdir / CONFIG)
        compilation_cache.use(self._trained_with.compilation_cache)
        self.config = self._config(sampling)
        self.class_names = class_names.read(workdir, self.config.data.num_classes)
        self.mesh = sharding.make_mesh(config_lib.mesh_shape(self.config, jax.device_count()))
        self.networks = Networks(self.config)
        name = ema or self.config.ema.sampled
        self.weights = f"ema {name}" if weights == "ema" and name != TEACHER else weights
        checkpoints = Checkpoints(workdir, read_only=True)
        try:
            abstract = self._abstract()

            def reading(step: int) -> Params:
                if weights == "ema":
                    return profiles.restore(checkpoints, self.config, abstract, step, ema)
                return checkpoints.restore_item(weights, abstract, step)

            self.step, self.params = checkpoints.read(step, reading)
        finally:
            checkpoints.close()

    def resampled(self, sampling: Mapping[str, Any]) -> "TrainedModel":
        """The same parameters with other values of the `sampling` section; nothing is read again.

        Raises:
          UserError: sampling values that cannot work.
        """
        other = copy.copy(self)
        other.config = self._config(sampling)
        return other

    def _config(self, sampling: Mapping[str, Any] | None) -> ConfigDict:
        """The run's own, made to fit these devices."""
        config = self._trained_with.copy_and_resolve_references()
        with config.unlocked():
            with config.sampling.ignore_type():  # DDPM's steps are a number or a list of sections
                # Who does not sample does not guide: a run whose null label was never trained can be looked into.
                config.sampling.update({"guidance_scale": 1.0} if sampling is None else sampling)
            config.mesh.update(data=-1, fsdp=1, model=1)  # the run's own mesh may have been a pod
            if config.model.attention != "plain":
                config.model.attention = "auto"  # and so may its kind of devices
            config.accumulation = 1
            config.batch_size *= jax.device_count()  # these devices can share it, and the method is content
        config_lib.check(config, jax.device_count())
        methods = config_lib.methods_of(config)
        if (sampling or {}).get("correction") and not methods.correcting:
            raise UserError(f"--correction: {self.workdir} was trained with {methods.name}, which shifts no velocity")
        return config

    def _abstract(self) -> Params:
        shapes = jax.eval_shape(self.networks.init, jax.random.key(0))
        layout = sharding.state_shardings(shapes, self.mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint and tree apart from any other, as JSON data."""
        folder = files.absolute(self.workdir) / "checkpoints" / str(self.step)
        metadata = folder / "_CHECKPOINT_METADATA"  # orbax writes the moment of the save into it
        return {
            "path": str(folder), "weights": self.weights,
            "saved": files.read_text(metadata) if files.exists(metadata) else "",
            "model": {key: value for key, value in self.config.model.items() if key != "attention"},  # of these devices
        }  # fmt: skip
