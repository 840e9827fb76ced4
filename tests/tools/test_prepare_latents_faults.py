"""tools/prepare_latents.py in process, on folders as users have them."""

import numpy as np
import pytest
from PIL import Image

from sra_jax.data import shards
from tests.in_process import call


@pytest.fixture
def flags(image_folder, tiny_vae, tmp_path):
    return [f"--source=imagefolder:{image_folder}", f"--vae={tiny_vae.folder}", "--image_size=16", "--batch_size=8",
            f"--output={tmp_path / 'out'}"]  # fmt: skip


@pytest.mark.faults
def test_what_is_there_and_what_is_left_out_is_said(image_folder, flags, tmp_path):
    (image_folder / ".ipynb_checkpoints").mkdir()
    (image_folder / "@eaDir").mkdir()
    (image_folder / "cat" / "cat.txt").write_text("a cat")
    (image_folder / "stray.png").write_bytes((image_folder / "dog" / "b.png").read_bytes())
    whole = (image_folder / "dog" / "b.png").read_bytes()
    (image_folder / "dog" / "damaged.png").write_bytes(whole[:33] + b"\xff" * 8 + whole[41:])
    Image.new("RGB", (16, 16)).save(image_folder / "dog" / "other.png", "AVIF")
    done = call("prepare_latents", *flags, code=3)
    assert "7 images, 2 classes: 0 = cat, 1 = dog" in done.stdout
    assert "left out 2 hidden or a system's, 1 .txt, 1 images beside the class folders" in done.stdout
    for name in ("damaged.png", "other.png"):
        assert f"skipped {image_folder / 'dog' / name}: " in done.stderr
    manifest = shards.read_manifest(tmp_path / "out")
    assert (manifest.examples, manifest.class_names, len(manifest.skipped)) == (5, ("cat", "dog"), 2)
    assert "are whole" in call("prepare_latents", "--verify", f"--output={tmp_path / 'out'}").stdout


@pytest.mark.faults
def test_verify_names_shard_and_index_of_nan(image_folder, flags, tmp_path, monkeypatch):
    to_bytes = shards.RecordLayout.to_bytes

    def spoil(self, moments, label):
        return to_bytes(self, np.full_like(moments, np.nan) if label == 1 else moments, label)

    with monkeypatch.context() as patch:
        patch.setattr(shards.RecordLayout, "to_bytes", spoil)
        call("prepare_latents", *flags)
    done = call("prepare_latents", "--verify", f"--output={tmp_path / 'out'}", code=4)
    assert "latents-00000-of-00001.arrayrecord, record 3 (example 3), holds NaN or infinite values" in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--data_dir=.",), "--data_dir=. is the folder of TFDS's sets, and imagefolder:"),
        (("--source=tfds:no_such_set", "--data_dir=."), "no_such_set is neither known to TFDS nor on disk in"),
        (("--source=tfds:imagenet2012:5.1.0", "--data_dir=absent"), "no folder at 'absent'"),
        (("--source=tfds:immagenet2012",), "did you mean imagenet2012?"),
        (("--source=tfds:a b",), "is not tfds:NAME"),
    ],
)
def test_wrong_input(flags, given, message, tmp_path):
    done = call("prepare_latents", *flags, *given, code=2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
