"""Make images from a run's checkpoint.

Reads the EMA of the newest (or --step's) checkpoint. The npz holds arr_0, the images (N,H,W,C) uint8, and arr_1, their
labels (N,) int64, as the ADM evaluation suite reads them, and class_names (K,), what the labels stand for, where the
run's set has names. Sample i depends on --seed, i and its label alone, so
--batch_size and the number of devices change nothing but speed. What is not given is taken from the run's config.

A run that is told captions takes --prompt or --prompts in place of --labels; arr_1 then numbers the prompts, which are
in the npz as well.

Exit codes: 0 done, 1 made but not written (kept elsewhere, the message says where), 2 bad input.

Examples:

    python tools/sample.py --workdir=runs/digits --num_samples=1000 --output=samples.npz --grid=grid.png
    python tools/sample.py --workdir=W --step=400000 --guidance_scale=1.8 --guidance_interval=0,0.7 --labels=207,360 \\
        --num_samples=64 --grid=grid.png
    python tools/sample.py --workdir=runs/digits_captions --prompt="a seven left of a one" --prompt="one, then four" \\
        --num_samples=20 --grid=grid.png
"""

import contextlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from sra_jax import heap

if __name__ == "__main__":
    heap.tune()

import numpy as np
from absl import flags
from tqdm import tqdm

from sra_jax import cli, files, remote, values
from sra_jax import config as config_lib
from sra_jax.errors import UserError
from sra_jax.runs.trained import TrainedModel
from sra_jax.sampling import pictures
from sra_jax.sampling.generation import Asked, Generator, generator_of
from sra_jax.sampling.options import (
    asked,
    define_label_flags,
    define_sampling_flags,
    describe_labels,
    sampling_overrides,
)

FLAGS = flags.FLAGS
GRID_COLUMNS = 10

cli.path_flag("workdir", None, "The run's folder.", required=True)
cli.whole_flag("step", None, "Checkpoint to read; by default the newest.", 0, values.COUNT_LIMIT)
flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which of the two parameter trees.")
cli.whole_flag("num_samples", 1000, "How many images.", 1, values.COUNT_LIMIT)
cli.whole_flag("seed", 0, "Of noise and uniform labels.", 0, values.SEED_LIMIT)
cli.whole_flag("batch_size", 250, "Images at a time over all devices.", 1, values.BATCH_LIMIT)
cli.path_flag("output", None, "npz file to write.")
cli.path_flag("grid", None, f"PNG file to write: the samples of each class or prompt in rows of {GRID_COLUMNS}.")
flags.DEFINE_bool("overwrite", False, "Replace --output and --grid where they exist.")
define_label_flags()
define_sampling_flags()


def main() -> None:
    """Load, sample, write."""
    if not FLAGS.output and not FLAGS.grid:
        raise UserError("nothing to write: give --output=samples.npz, --grid=grid.png or both")
    files.check_outputs_differ(output=FLAGS.output, grid=FLAGS.grid)
    outputs = {flag: path for flag in ("output", "grid") if (path := FLAGS[flag].value)}
    for flag, path in outputs.items():
        files.check_output(f"--{flag}", path, FLAGS.overwrite)
    model = TrainedModel(remote.path(FLAGS.workdir), FLAGS.step, FLAGS.weights, sampling_overrides(), FLAGS.ema)
    chosen_labels = asked(model, FLAGS.num_samples, FLAGS.seed)
    if said := describe_labels(chosen_labels, model.class_names):
        print(f"labels: {said}", file=sys.stderr)
    generator = generator_of(model, FLAGS.batch_size, FLAGS.seed)
    with contextlib.ExitStack() as locks:
        for flag, path in outputs.items():
            locks.enter_context(files.locked_output(path, f"choose another --{flag}"))
        make(model, generator, chosen_labels)


def make(model: TrainedModel, generator: Generator, chosen_labels: Asked) -> None:
    """Sample and write."""
    batches: list[np.ndarray] = []
    given: list[np.ndarray] = []
    with tqdm(total=FLAGS.num_samples, desc=f"sampling step {model.step}", unit="image", dynamic_ncols=True) as bar:
        for batch, chosen in generator.images(model.params, FLAGS.num_samples, chosen_labels):
            if FLAGS.output and not batches:
                files.check_room("--output", FLAGS.output, batch[0].nbytes * FLAGS.num_samples)
            batches.append(batch)
            given.append(chosen)
            bar.update(len(batch))
    images, labels = np.concatenate(batches), np.concatenate(given)
    results = {}
    if FLAGS.output:
        arrays = {"arr_0": images, "arr_1": labels.astype(np.int64)}
        if config_lib.tells_captions(model.config):
            arrays["prompts"] = np.array(chosen_labels)
        if model.class_names is not None:
            arrays["class_names"] = np.array(model.class_names)
        results[remote.path(FLAGS.output)] = lambda path: files.write_npz(path, arrays)
    if FLAGS.grid:
        results[remote.path(FLAGS.grid)] = lambda path: files.write_png(path, class_rows(images, labels))
    files.write_results(results)
    if FLAGS.output:
        print(f"{FLAGS.output}: arr_0 {images.shape} uint8, arr_1 {labels.shape}")
    if FLAGS.grid:
        print(f"{FLAGS.grid}: {GRID_COLUMNS} samples a row, one row a class or prompt")


def class_rows(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The first samples of the first ten classes or prompts, one row each; white where there are too few."""
    rows = []
    for label in np.unique(labels)[:GRID_COLUMNS]:
        row = images[labels == label][:GRID_COLUMNS]
        missing = np.full((GRID_COLUMNS - len(row), *images.shape[1:]), 255, np.uint8)
        rows += [row, missing]
    return pictures.grid(np.concatenate(rows), GRID_COLUMNS)


if __name__ == "__main__":
    cli.run(main)
