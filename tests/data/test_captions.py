import pickle

import numpy as np
import pytest

from sra_jax.data import digits_captions, pipeline
from sra_jax.data.captions import turn
from sra_jax.data.digits_captions import HELD_OUT, SINGLES, TRAINED, WORDINGS


@pytest.fixture(scope="module")
def source():
    return digits_captions.DigitsCaptions()


def test_captions_come_in_turn():
    """In as many epochs as an image has captions each comes once; images begin anywhere."""
    indices, counts = np.arange(600), 1 + np.arange(600) % 5
    seen = np.stack([turn(indices, np.full(600, epoch), counts) for epoch in range(60)])
    for index, count in zip(indices, counts, strict=True):
        np.testing.assert_array_equal(np.bincount(seen[:, index], minlength=count), 60 // count)
    first = seen[0, counts == 5]
    assert np.bincount(first, minlength=5).min() > 0.5 * len(first) / 5
    assert (seen[0] != seen[1])[counts > 1].all()


def test_batches_choose_captions_by_epoch(source):
    """The stream gives each image the caption of its epoch, whichever process reads it and wherever it starts."""
    small = digits_captions.DigitsCaptions.__new__(digits_captions.DigitsCaptions)
    small.__dict__ = {**source.__dict__, "images": source.images[:6]}
    small._first, small._counts = source._first[:6], source._counts[:6]
    stream = pipeline.batches(small, batch_size=4, seed=3, rows=range(4))
    batches = [next(stream) for _ in range(9)]
    stream.close()
    order = [(epoch, index) for epoch in range(6) for index in pipeline.epoch_order(6, 3, epoch)]
    for k, batch in enumerate(batches):
        for row in range(4):
            epoch, index = order[4 * k + row]
            expected = small.read_epochs(np.array([index]), np.array([epoch]))
            for name, array in expected.items():
                np.testing.assert_array_equal(batch[name][row], array[0])
    later = pipeline.batches(small, batch_size=4, seed=3, rows=[2], start=5)
    np.testing.assert_array_equal(next(later)["context"][0], batches[5]["context"][2])
    later.close()


def test_held_out_pairs_are_never_trained():
    assert len(HELD_OUT) == 20
    assert len(TRAINED) == 80
    assert not set(HELD_OUT) & set(TRAINED)
    for side in (0, 1):
        assert {pair[side] for pair in TRAINED} == {pair[side] for pair in HELD_OUT} == set(range(10))


def test_canvases_and_captions_fit(source):
    """Each canvas's captions, embedded, are those of its digits: pairs are trained ones; scans are the generator's."""
    text = digits_captions.text_encoder(None)
    by_caption = {text([caption])["context"].tobytes(): content
                  for content in (*SINGLES, *TRAINED) for caption in digits_captions.captions(content)}  # fmt: skip
    scans, labels = digits_captions.scans("generator")
    shapes = {labels[i]: set() for i in range(len(labels))}
    for scan, label in zip(scans, labels, strict=True):
        shapes[label].add(scan.tobytes())
    for index in range(40):
        contents = {
            by_caption[source.read_epochs(np.array([index]), np.array([epoch]))["context"].tobytes()]
            for epoch in range(4)
        }
        assert len(contents) == 1
        (content,) = contents
        for digit, left in zip(content, (4,) if len(content) == 1 else (0, 8), strict=True):
            part = source.images[index, :, left : left + 8, 0]
            assert any(part[top : top + 8].tobytes() in shapes[digit] for top in range(9))


def test_parts_share_no_scan():
    parts = [digits_captions.scans(part)[0] for part in digits_captions.PARTS]
    assert sum(map(len, parts)) == 1797
    order = np.random.RandomState(0).permutation(1797)
    chosen = [set(order[part].tolist()) for part in digits_captions.PARTS.values()]
    assert len(set.union(*chosen)) == sum(map(len, chosen))


def test_every_word_is_a_token():
    text = digits_captions.text_encoder(None)
    for count, wordings in WORDINGS.items():
        content = (3, 7)[:count]
        for number, wording in enumerate(wordings):
            caption = digits_captions.caption(content, number)
            words = caption.replace(",", " ,").split()
            assert len(words) == len(wording.replace(",", " ,").split())
            ids, ends, cut = text.tokenizer([caption])
            assert ends[0] == len(words) + 1
            assert not cut[0]
            assert (ids[0, ends[0] :] == ids[0, -1]).all()


def test_captions_that_differ_are_told_apart():
    """All captions of all canvases have embeddings of their own, and none is the empty one's."""
    text = digits_captions.text_encoder(None)
    captions = [c for content in (*SINGLES, *TRAINED, *HELD_OUT) for c in digits_captions.captions(content)]
    contexts = np.concatenate([text(captions)["context"], text.null["context"][None]]).reshape(len(captions) + 1, -1)
    distances = np.linalg.norm(contexts[:, None] - contexts[None], axis=-1) + 10 * np.eye(len(contexts))
    assert distances.min() > 0.5
    assert contexts.shape[1] == digits_captions.LENGTH * digits_captions.TOWER["hidden_size"]


def test_prompts():
    captions, contents = digits_captions.prompts("held_out", 200, seed=0)
    assert len(captions) == len(contents) == 200
    assert set(contents) == set(HELD_OUT)
    assert captions == digits_captions.PROMPT_LISTS["held_out"](200, 0)
    pairs = zip(captions, contents, strict=True)
    assert all(caption in digits_captions.captions(content) for caption, content in pairs)
    assert captions != digits_captions.prompts("held_out", 200, seed=1)[0]


def test_the_source_travels_to_workers(source):
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[7]["image"], source[7]["image"])
