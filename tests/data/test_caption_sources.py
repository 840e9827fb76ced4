import json

import numpy as np
import pytest
from PIL import Image

from sra_jax.data import caption_sources
from sra_jax.data.caption_sources import open_captions, usable
from sra_jax.data.images import read_image, square_crop
from sra_jax.errors import UserError
from tests.fixtures import COCO_CAPTIONS


def test_coco_in_the_order_of_ids(coco_folder):
    source = open_captions(f"coco:{coco_folder}:tiny2014")
    assert len(source) == 5
    assert [item.content.name for item in source.items(0, 5)] == [f"COCO_{i:03d}.png" for i in sorted(COCO_CAPTIONS)]
    for item, number in zip(source.items(0, 5), sorted(COCO_CAPTIONS), strict=True):
        assert list(item.captions) == COCO_CAPTIONS[number]
        assert read_image(item.content).size == (20, 26)


def test_what_cannot_be_used_is_named(coco_folder):
    source = open_captions(f"coco:{coco_folder}:tiny2014")
    found = {item.content.name: usable(item) for item in source.items(0, 5)}
    assert found["COCO_003.png"] == (["a dog"], [])
    good, bad = found["COCO_012.png"]
    assert good == ["dog dog", "cat cat cat cat cat cat cat cat"]
    assert [reason for _, reason in bad] == ["its caption is empty", "its caption is NoneType, not text"]
    good, bad = found["COCO_005.png"]
    assert not good
    assert "told the empty one" in bad[-1][1]


def test_a_folder_with_a_line_an_image(tmp_path):
    for name in ("b.png", "a.png"):
        Image.new("RGB", (3, 4)).save(tmp_path / name)
    lines = [{"file": "b.png", "captions": ["one", "two"]}, {"file": "a.png", "caption": "three"}]
    text = "\n".join(map(json.dumps, lines)).encode() + b'\n\n{"file": "c.png", "captions": ["caf\xe9"]}\n'
    (tmp_path / "captions.jsonl").write_bytes(text)
    source = open_captions(f"captions:{tmp_path}")
    assert [item.captions for item in source.items(0, 2)] == [("one", "two"), ("three",)]
    _, bad = usable(source[2])
    assert bad[0][1] == "its caption is not UTF-8"
    before = source.fingerprint()
    (tmp_path / "captions.jsonl").write_bytes(text.replace(b"two", b"too"))
    assert open_captions(f"captions:{tmp_path}").fingerprint() != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "is not"), ('{"captions": []}', "is not"), ('{"file": 3}', "is no name of a file"),
        ('{"file": "../x.png"}', "leads out of the folder"), ("{", "is not"), ("", "lists no image"),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        open_captions(f"captions:{tmp_path}")


def test_bad_coco_folders(coco_folder, tmp_path):
    with pytest.raises(UserError, match="no folder at"):
        open_captions(f"coco:{tmp_path / 'absent'}")
    with pytest.raises(UserError, match=r"there is no .*captions_train2014\.json"):
        open_captions(f"coco:{coco_folder}")
    listing = coco_folder / "annotations" / "captions_tiny2014.json"
    values = json.loads(listing.read_text())
    values["annotations"].append({"image_id": 77, "caption": "x"})
    listing.write_text(json.dumps(values))
    with pytest.raises(UserError, match="captions of 1 images that it does not list: 77"):
        open_captions(f"coco:{coco_folder}:tiny2014")
    listing.write_text('{"images": 3}')
    with pytest.raises(UserError, match="is not COCO's"):
        open_captions(f"coco:{coco_folder}:tiny2014")


def test_one_caption_of_each_of_some_images(coco_folder):
    name = f"coco:{coco_folder}:tiny2014"
    chosen = caption_sources.prompts(name, 4, seed=0)
    good = [set(usable(item)[0]) for item in open_captions(name).items(0, 5)]
    assert len(chosen) == 4
    assert chosen == caption_sources.prompts(name, 4, seed=0)
    assert any(caption_sources.prompts(name, 4, seed=seed) != chosen for seed in range(1, 5))
    assert sum(any(prompt in captions for prompt in chosen) for captions in good) == 4
    with pytest.raises(UserError, match="captions of 4 images, fewer than the 5"):
        caption_sources.prompts(name, 5, seed=0)


def test_square_crop_is_u_vits():
    """Rows and columns as U-ViT cuts them; then Pillow's Lanczos."""
    pixels = np.random.default_rng(0).integers(0, 256, (21, 30, 3), np.uint8)
    expected = Image.fromarray(pixels[:, (30 - 21) // 2 : (30 + 21) // 2]).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(square_crop(Image.fromarray(pixels), 8), expected)
