"""The command as a user runs it, on folders of small images and a small autoencoder."""

import json
import re
import signal
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from sra_jax.data import latents, shards
from sra_jax.data.images import centre_crop, read_image, to_array
from sra_jax.interop import autoencoder as vae_interop
from tests import running

TOOL = "tools/prepare_latents.py"


def run(*arguments, code=0, fresh=False):
    return running.run(TOOL, *map(str, arguments), devices=2, code=code, fresh=fresh)


def start(*arguments, **environment):
    return running.start(TOOL, *map(str, arguments), devices=2, environment=environment)


def config(folder):
    return ConfigDict({"path": str(folder), "image_size": 8, "channels": 4, "num_classes": 2, "vae": ""})


@pytest.fixture
def flags(image_folder, tiny_vae):
    return [f"--source=imagefolder:{image_folder}", f"--vae={tiny_vae.folder}", "--image_size=16", "--batch_size=2"]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_images_become_latents(image_folder, tiny_vae, flags, tmp_path):
    """Odd images are converted, a damaged one is skipped and told, each image's flipped copy follows it."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 24, 4), np.uint8)
    Image.fromarray(noise[..., 0]).save(image_folder / "cat" / "grey.png")
    Image.fromarray(noise, "CMYK").save(image_folder / "cat" / "cmyk.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(image_folder / "dog" / "deep.png")
    Image.fromarray(noise[:9, :7, :3]).save(image_folder / "dog" / "small.png")
    broken = image_folder / "dog" / "a.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    output = tmp_path / "out"
    done = run(*flags, f"--output={output}", "--flip", "--shard_size=5", code=3, fresh=True)
    assert f"skipped {broken}" in done.stderr
    assert "8 images encoded" in done.stdout
    assert "1 unreadable" in done.stdout

    manifest = shards.read_manifest(output)
    assert (manifest.examples, manifest.class_names, len(manifest.shards)) == (16, ("cat", "dog"), 2)
    assert [name for name, _ in manifest.skipped] == [str(broken)]
    files = sorted((image_folder / "cat").rglob("*.*")) + sorted((image_folder / "dog").glob("*.*"))
    crops = [to_array(centre_crop(read_image(file), 16), 3) for file in files if file != broken]
    crops = np.stack([flipped for crop in crops for flipped in (crop, crop[:, ::-1])])
    mean, std = vae_interop.load(str(tiny_vae.folder)).encode(crops / np.float32(127.5) - 1)
    stored = latents.load(config(output)).source.read_batch(range(16))
    np.testing.assert_allclose(stored["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stored["std"], std, rtol=1e-4)
    np.testing.assert_array_equal(stored["label"], [0] * 10 + [1] * 6)

    assert "2 shards with 16 examples are whole" in run("--verify", f"--output={output}").stdout
    damaged = output / manifest.shards[1].file
    content = bytearray(damaged.read_bytes())
    content[300] ^= 1
    damaged.write_bytes(content)
    assert f"{damaged} has another checksum" in run("--verify", f"--output={output}", code=4).stderr


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_preparation_goes_on_to_the_same_bytes(flags, tmp_path):
    flags = [*flags, "--shard_size=1"]
    run(*flags, f"--output={tmp_path / 'whole'}")
    output = tmp_path / "killed"
    process = start(*flags, f"--output={output}")
    while process.poll() is None and not list((output / "progress").glob("0*.json")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert not (output / "manifest.json").exists()
    run(*flags, f"--output={output}")
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


def test_two_processes_cover_the_set_once(flags, tmp_path):
    flags = [*flags, "--shard_size=2"]
    run(*flags, f"--output={tmp_path / 'whole'}")
    output = tmp_path / "shared"
    processes = [
        start(*flags, f"--output={output}", SLURM_PROCID=str(i), SLURM_STEP_NUM_TASKS="2") for i in range(2)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "3 images encoded by process 0 of 2" in said[0]
    assert "2 images encoded by process 1 of 2" in said[1]
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


def test_moments_are_converted_without_weights(tmp_path):
    source = tmp_path / "edm2"
    source.mkdir()
    array = np.abs(np.random.default_rng(0).normal(size=(8, 32, 32))).astype(np.float32)
    np.save(source / "0.npy", array)
    (source / "dataset.json").write_text(json.dumps({"labels": [["0.npy", 7]]}))
    output = tmp_path / "out"
    run(f"--source=edm2:{source}", f"--output={output}")
    manifest = shards.read_manifest(output)
    assert (manifest.settings["image_size"], manifest.vae_config.scaling_factor) == (256, 0.18215)
    example = latents.LatentSource(str(output), manifest)[0]
    np.testing.assert_array_equal(np.moveaxis(example["std"], -1, 0), array[4:])
    assert example["label"] == 7


def test_bad_input_ends_before_any_work(image_folder, tiny_vae, flags, tmp_path):
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    bad = {
        "--output is missing": flags,
        "--source is missing": [f"--output={output}"],
        "has no class folders": [*flags, f"--output={output}", f"--source=imagefolder:{tmp_path / 'empty'}"],
        "--image_size=17 must be a multiple of the VAE's factor 2": [*flags, f"--output={output}", "--image_size=17"],
        "has no config.json: download": [*flags, f"--output={output}", f"--vae={tmp_path / 'empty'}"],
        "no prepared latents at": ["--verify", f"--output={output}"],
    }
    for message, arguments in bad.items():
        stderr = run(*arguments, code=2).stderr
        assert re.search(f"error: .*{re.escape(message)}", stderr), stderr
        assert "Traceback" not in stderr
    assert not output.exists()
