import itertools

import numpy as np
import pytest

from sra_jax.data import digits, pipeline, registry, synthetic
from sra_jax.errors import UserError


class Numbers:
    """n examples that carry their index."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"index": np.int64(index), "label": np.int32(index % 3)}


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
