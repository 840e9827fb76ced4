"""The linear probe of one run: which examples train it, and which it is tested on."""

from pathlib import Path

import numpy as np

from sra_jax import config as config_lib
from sra_jax.data import classes
from sra_jax.data import registry as datasets
from sra_jax.data.dataset import Dataset
from sra_jax.errors import UserError
from sra_jax.inspection.probe import Schedule, probe
from sra_jax.inspection.tokens import FeatureSet, Settings, extract_to_disk
from sra_jax.runs.trained import TrainedModel

TEST_SHARE = 0.2
"""Of the run's own examples, where no other set is named for the test."""

SPLIT_SEED = 0


def open_set(model: TrainedModel, path: str) -> Dataset:
    """The set at a `data.path`, which has the run's classes.

    Raises:
      UserError: there is no such set, or one of other classes.
    """
    with model.config.unlocked():
        model.config.data.path = path
    dataset = datasets.load(model.config.data)
    classes.check_same(model.class_names, dataset.class_names, path or model.config.data.name)
    return dataset


def split(count: int, tested: bool, num_examples: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` examples train a probe, and which of them test it; both ascending, always the same.

    Args:
      count: examples of the training set.
      tested: whether another set tests it, so that none is left out.
      num_examples: at most so many train it; 0 takes all.

    Raises:
      UserError: too few examples.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    held_out = 0 if tested else round(TEST_SHARE * count)
    train = np.sort(order[held_out:][: num_examples or None])
    if not tested and (not held_out or not len(train)):
        raise UserError(f"{count} examples are too few to train and to test a probe on")
    return train, order[:held_out]


def probe_run(
    model: TrainedModel, cache: Path, settings: Settings, schedule: Schedule, *, path: str | None = None,
    test_path: str | None = None, num_examples: int = 0, num_tests: int = 0, batch_size: int = 256, name: str = "run",
) -> np.ndarray:
    """Train probes on a run's features and test them.

    Args:
      model: the run.
      cache: folder in which features are kept.
      settings: which features.
      schedule: how probes are trained.
      path: `data.path` of the training set; None: the run's own.
      test_path: of a held-out set; None: a fifth of the training set.
      num_examples, num_tests: at most so many examples of each; 0 takes all.
      batch_size: examples through the network at a time.
      name: what the progress bars say.

    Returns:
      Accuracies (levels, blocks) in [0, 1].

    Raises:
      UserError: no such set, one of other classes, or too few examples.
    """
    if config_lib.tells_captions(model.config):
        raise UserError(f"{name} is a run with captions, and the linear probe predicts labels, which it has not")
    train_path = path or model.config.data.path
    dataset = open_set(model, train_path)
    test = open_set(model, test_path) if test_path else dataset
    classes.check_same(dataset.class_names, test.class_names, f"--test_path={test_path}")
    train, left_out = split(len(dataset.source), bool(test_path), num_examples)
    if test_path:
        left_out = np.random.default_rng(SPLIT_SEED).permutation(len(test.source)) if num_tests else np.arange(
            len(test.source)
        )  # fmt: skip
    tests = np.sort(left_out[: num_tests or None])

    def features(dataset: Dataset, path: str, indices: np.ndarray, part: str) -> FeatureSet:
        with model.config.unlocked():
            model.config.data.path = path  # the cache's name depends on it
        return extract_to_disk(model, dataset, indices, settings, cache, batch_size, f"{name}: {part} features")

    train_set = features(dataset, train_path, train, "training")
    test_set = features(test, test_path or train_path, tests, "test")
    return probe(train_set, test_set, model.config.data.num_classes, schedule)
