"""Train a recipe.

Every value of a recipe is a flag: --config.steps, --config.batch_size (over all devices), --config.seed,
--config.dtype, --config.log_every, --config.sample_every, --config.checkpoint_every, --config.keep, --config.model.*,
--config.alignment.*, --config.sampling.*; docs/configuration.md lists and explains them all, --print_config shows
what a command would run. The same command on a workdir that holds a run goes on where it stopped.

On TPU pods, and where srun, mpirun or an indexed Kubernetes job starts one process a host, the processes find each
other; elsewhere start each with --coordinator_address=HOST:PORT --num_processes=N --process_id=I. SIGTERM and Ctrl-C
finish the step and save; the same command goes on from there. docs/reliability.md says what else a run survives.

Exit codes: 0 done, 1 the run failed (a loss that is not finite, a full disk), 2 bad input, 75 SIGTERM and 130 Ctrl-C:
saved, start it again.

Examples:

    python main.py --config=configs/digits.py
    python main.py --config=configs/sit_b2.py --workdir=/data/sit_b2 --config.data.path=/data/latents
    python main.py --config=configs/sit_b2.py:smoke --config.seed=3
    python main.py --config=configs/sit_b2.py --config.model.depth=10 --print_config
"""

from sra_jax import heap

if __name__ == "__main__":
    heap.tune()

from absl import flags

from sra_jax import cli, remote
from sra_jax import config as config_lib
from sra_jax.distributed import processes
from sra_jax.training.loop import train

FLAGS = flags.FLAGS
CONFIG = config_lib.define_flag("The recipe: configs/NAME.py, or configs/NAME.py:VARIANT.")
WORKDIR = cli.path_flag("workdir", None, "Folder of the run, or gs://bucket/run; by default runs/ and the recipe's.")
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir although its saved config differs in what shapes the run."
)
PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Show the recipe with all overrides, check it, and end; no data and no device is touched."
)
processes.define_flags()


def main() -> None:
    """Flags to `train`."""
    config = config_lib.from_flag(CONFIG.value)
    if PRINT_CONFIG.value:
        print(config_lib.readable(config))
        config_lib.check(config, config_lib.fewest_devices(config))
        return
    heap.tune(config_lib.held_by_a_step(config))
    with processes.joined():
        train(config, remote.path(WORKDIR.value or f"runs/{config.name}"), ALLOW_CONFIG_CHANGE.value)


if __name__ == "__main__":
    cli.run(main)
