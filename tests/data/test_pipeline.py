import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sra_jax.data import digits, pipeline, registry, synthetic
from sra_jax.errors import UserError
from tests.conftest import ROOT

READER = """
import multiprocessing, signal, sys, time
from absl import flags
from sra_jax.data import digits, pipeline
from sra_jax.data.registry import load
from configs.digits import get_config

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    told = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: told.append(1))
    source = load(get_config().data).source
    stream = pipeline.batches(source, batch_size=4, seed=1, rows=range(4), workers=1)
    next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    while len(told) < 2:
        next(stream)
    for _ in range(20):
        next(stream)
    print("read on", flush=True)
    time.sleep(60)
"""


class Numbers:
    """n examples that carry their index."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"index": np.int64(index), "label": np.int32(index % 3)}


class Killed(Numbers):
    """As if reading took all memory."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def take(count, **options):
    settings = {"batch_size": 8, "seed": 1, "rows": range(8)} | options
    return [batch["index"] for batch in itertools.islice(pipeline.batches(Numbers(21), **settings), count)]


def test_every_epoch_covers_every_example_once():
    """21 examples in batches of 8: epochs end inside batches, and nothing is dropped there."""
    seen = np.concatenate(take(21)).reshape(8, 21)
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(21))
    assert len({tuple(epoch) for epoch in seen}) == 8  # each in another order


def test_seed_decides_the_order():
    assert np.array_equal(take(3), take(3))
    assert not np.array_equal(take(3), take(3, seed=2))


def test_the_order_of_a_seed_never_changes():
    """A run that is resumed with other versions goes on with the examples that it would have read."""
    np.testing.assert_array_equal(take(1)[0], [19, 15, 13, 20, 8, 1, 5, 6])
    np.testing.assert_array_equal(np.concatenate(take(6, seed=5))[21:42], pipeline.epoch_order(21, 5, 1))


@pytest.mark.parametrize("parts", [[range(4), range(4, 8)], [[0, 1, 6, 7], [2, 3, 4, 5]], [[i] for i in range(8)]])
def test_processes_share_the_global_batches(parts):
    whole = take(6)
    for rows in parts:
        for batch, share in zip(whole, take(6, rows=rows), strict=True):
            np.testing.assert_array_equal(share, batch[np.asarray(rows)])


@pytest.mark.parametrize("start", [1, 2, 5])
def test_a_stream_can_start_anywhere(start):
    np.testing.assert_array_equal(take(7)[start:], take(7 - start, start=start))


def test_worker_processes_change_nothing():
    np.testing.assert_array_equal(take(5, start=2), take(5, start=2, workers=2))


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_worker_is_replaced(capfd):
    others = set(multiprocessing.active_children())
    stream = pipeline.batches(Numbers(21), batch_size=8, seed=1, rows=range(8), workers=1)
    read = [next(stream)["index"] for _ in range(3)]
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    read += [next(stream)["index"] for _ in range(5)]
    stream.close()
    np.testing.assert_array_equal(read, take(8))
    assert "a worker process of data.workers was killed from outside" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.faults
def test_workers_that_are_killed_again_and_again_are_given_up(monkeypatch):
    monkeypatch.setattr(pipeline, "RESTARTS", 1)
    stream = pipeline.batches(Killed(4), batch_size=2, seed=1, rows=range(2), workers=1)
    with pytest.raises(pipeline.WorkerLost, match=r"2 times at batch 0; fewer data\.workers"):
        next(stream)
    stream.close()


@pytest.mark.slow
@pytest.mark.faults
def test_workers_hear_no_signal_of_their_group_and_end_with_their_parent(tmp_path):
    program = tmp_path / "reader.py"
    program.write_text(READER)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    try:
        worker = int(process.stdout.readline())
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "read on\n"
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 30
    while running(worker):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def running(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_digits():
    dataset = registry.load(registry_section(name="digits", image_size=8, channels=1, num_classes=10))
    assert len(dataset.source) == 1797
    example = dataset.source[5]
    assert example["image"].shape == dataset.latent_shape
    latents = dataset.encode({"image": np.stack([dataset.source[i]["image"] for i in range(50)])}, None)
    assert (float(latents.min()), float(latents.max())) == (-1, 1)
    grey = np.asarray(digits.decode(latents))
    np.testing.assert_array_equal(np.round(grey / 255 * 16), np.stack([dataset.source[i]["image"] for i in range(50)]))


def test_decoding_clips():
    np.testing.assert_array_equal(digits.decode(np.full((1, 8, 8, 1), 1.7, np.float32)), 255)
    np.testing.assert_array_equal(digits.decode(np.full((1, 8, 8, 1), -3, np.float32)), 0)


def test_synthetic():
    dataset = registry.load(registry_section(name="synthetic", image_size=4, channels=2, num_classes=7))
    first = dataset.source[3]
    np.testing.assert_array_equal(first["latent"], dataset.source[3]["latent"])
    sample = np.stack([dataset.source[i]["latent"] for i in range(300)])
    assert sample.shape == (300, 4, 4, 2)
    assert sample.std() == pytest.approx(1, abs=0.03)
    assert {int(dataset.source[i]["label"]) for i in range(300)} == set(range(7))
    assert registry.decoder(registry_section(name="synthetic", channels=2))(sample).shape == (300, 4, 4, 1)
    assert len(dataset.source) == synthetic.EXAMPLES


def registry_section(**values):
    from sra_jax.config import default

    data = default().data
    data.update(values)
    return data


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "imagenet"}, "'imagenet' is unknown; allowed: digits"),
        ({"name": "digits", "image_size": 16, "channels": 1, "num_classes": 10}, "image_size=16 does not fit"),
        ({"name": "digits", "image_size": 8, "channels": 3, "num_classes": 10}, "channels=3 does not fit"),
        ({"name": "digits", "image_size": 8, "channels": 1, "num_classes": 5}, "num_classes=5 does not fit"),
    ],
)
def test_sets_that_do_not_fit(values, message):
    with pytest.raises(UserError, match=message):
        registry.load(registry_section(**values))
