import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from sra_jax.data import latents, pipeline, shards
from sra_jax.data.moments import MomentsFolder
from sra_jax.data.preparation import MomentsCopier, prepare
from sra_jax.errors import RunError, UserError
from sra_jax.interop import autoencoder as vae_interop
from tests.conftest import ROOT

EXAMPLES, SHAPE = 11, (4, 4, 4)
LYING_HEADER = b"\x93NUMPY\x01\x00v\x00" + (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999,)}".ljust(118)
)  # fmt: skip


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """A folder of .npy moments as the PyTorch code has them, and its (means, standard deviations, labels)."""
    folder = tmp_path_factory.mktemp("edm2")
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(2, EXAMPLES, *SHAPE)).astype(np.float32)
    std, labels = np.exp(std), rng.permutation(EXAMPLES) % 3
    for i in range(EXAMPLES):
        array = np.concatenate([np.moveaxis(mean[i], -1, 0), np.moveaxis(std[i], -1, 0)])
        np.save(folder / f"{i:03d}.npy", array)
    listing = [[f"{i:03d}.npy", int(labels[i])] for i in range(EXAMPLES)]
    (folder / "dataset.json").write_text(json.dumps({"labels": listing[::-1]}))
    return folder, mean, std, labels


def prepare_moments(moments, vae, output, dtype="float32", **options):
    source = MomentsFolder(str(moments[0]))
    return prepare(
        source, MomentsCopier(source, vae.config), str(output), source_name=f"edm2:{moments[0]}",
        vae_name=str(vae.folder), vae_fingerprint=None, vae_config=vae.config, dtype=dtype, batch_size=2, shard_size=4,
        workers=2, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(moments, tiny_vae, tmp_path_factory):
    """Prepared latents, three shards."""
    output = tmp_path_factory.mktemp("latents") / "out"
    assert prepare_moments(moments, tiny_vae, output).complete
    return output


def config(folder, **changes):
    values = {"name": "latents", "path": str(folder), "image_size": 4, "channels": 4, "num_classes": 3, "vae": ""}
    return ConfigDict(values | changes)


@pytest.mark.parametrize("dtype", shards.DTYPES)
def test_examples_are_the_stored_moments(dtype, moments, tiny_vae, tmp_path):
    _, mean, std, labels = moments
    prepare_moments(moments, tiny_vae, tmp_path / "out", dtype)
    source = latents.load(config(tmp_path / "out")).source
    assert len(source) == EXAMPLES
    for i in range(EXAMPLES):
        example = source[i]
        np.testing.assert_array_equal(example["mean"], mean[i].astype(jnp.dtype(dtype)))
        np.testing.assert_array_equal(example["std"], std[i].astype(jnp.dtype(dtype)))
        assert (example["label"], example["label"].dtype, example["label"].shape) == (labels[i], np.int32, ())
    order = [10, 0, 5, 5, 3, 9]
    batch = source.read_batch(order)
    for key in ("mean", "std", "label"):
        np.testing.assert_array_equal(batch[key], np.stack([source[i][key] for i in order]))
        assert batch[key].dtype == source[0][key].dtype
        assert batch[key].flags.c_contiguous


@pytest.mark.parametrize("dtype", shards.DTYPES)
def test_encode_samples_the_posterior_by_the_key(dtype, folder, tiny_vae):
    dataset = latents.load(config(folder))
    batch = {key: jnp.asarray(value) for key, value in dataset.source.read_batch(range(6)).items()}
    batch |= {key: batch[key].astype(dtype) for key in ("mean", "std")}
    key = jax.random.key(3)
    drawn = jax.jit(dataset.encode)(batch, key)
    noise = np.asarray(jax.random.normal(key, batch["mean"].shape))
    expected = (np.asarray(batch["mean"], np.float64) + np.asarray(batch["std"], np.float64) * noise) * 0.5
    assert drawn.dtype == jnp.float32
    assert tiny_vae.config.scaling_factor == 0.5
    np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=1e-6)
    assert dataset.latent_shape == drawn.shape[1:] == SHAPE
    assert not np.allclose(drawn, dataset.encode(batch, jax.random.key(4)))


def test_the_shift_of_newer_autoencoders_is_taken_off():
    batch = {"mean": jnp.full((1, 2, 2, 1), 5.0), "std": jnp.zeros((1, 2, 2, 1))}
    np.testing.assert_allclose(latents.sample_posterior(batch, jax.random.key(0), 0.25, 3.0), 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_worker_processes_read_the_same(dtype, moments, tiny_vae, tmp_path):
    prepare_moments(moments, tiny_vae, tmp_path / "out", dtype)
    source = latents.load(config(tmp_path / "out")).source
    source[0]
    assert pickle.loads(pickle.dumps(source)).read_batch([7])["label"] == source[7]["label"]
    stream = grain.MapDataset.source(source).batch(4).to_iter_dataset()
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    flags.FLAGS.mark_as_parsed()  # grain's workers read their options there
    batches = list(stream)
    for key in ("mean", "std", "label"):
        joined = np.concatenate([batch[key] for batch in batches])
        np.testing.assert_array_equal(joined, source.read_batch(range(EXAMPLES))[key])


def test_two_processes_make_each_shard_once_with_the_same_bytes(moments, tiny_vae, folder, tmp_path):
    output = tmp_path / "out"
    first = prepare_moments(moments, tiny_vae, output, process_index=0, process_count=2)
    assert (first.examples, first.complete) == (7, False)  # shards 0 and 2: four and three examples
    with pytest.raises(UserError, match=r"prepared only in part"):
        latents.load(config(output))
    second = prepare_moments(moments, tiny_vae, output, process_index=1, process_count=2)
    assert (second.examples, second.complete) == (4, True)
    for file in (*sorted(folder.glob("*.arrayrecord")), folder / "manifest.json"):
        assert (output / file.name).read_bytes() == file.read_bytes()
    again = prepare_moments(moments, tiny_vae, output)
    assert (again.examples, again.complete) == (0, True)


def test_a_deleted_shard_is_made_again(moments, tiny_vae, folder, tmp_path):
    output = shutil.copytree(folder, tmp_path / "out")
    lost = sorted(output.glob("*.arrayrecord"))[1]
    lost.unlink()
    assert prepare_moments(moments, tiny_vae, output).examples == 4
    assert lost.read_bytes() == (folder / lost.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 8}, "data.image_size=8, but the latents in .* are 4x4"),
        ({"channels": 16}, "data.channels=16, but the latents in .* have 4"),
        ({"num_classes": 2}, "data.num_classes=2, but the latents in .* have 3 classes"),
        ({"path": ""}, "data.path is empty"),
        ({"path": "/no/such/folder"}, "no prepared latents at /no/such/folder"),
    ],
)
def test_config_that_does_not_fit(folder, changes, message):
    with pytest.raises(UserError, match=message):
        latents.load(config(folder, **changes))


def test_sets_without_class_names_may_have_more_classes(folder):
    assert latents.load(config(folder, num_classes=1000)).num_classes == 1000


@pytest.mark.faults
def test_damaged_shards_are_named(folder, tmp_path):
    output = shutil.copytree(folder, tmp_path / "out")
    manifest = shards.read_manifest(output)
    cut, lost, changed = (output / shard.file for shard in manifest.shards)
    whole = changed.read_bytes()
    at = whole.index(latents.load(config(folder)).source[9]["mean"].tobytes())
    changed.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    source = latents.load(config(output)).source  # all sizes are right
    with pytest.raises(UserError, match=changed.name):
        source[9]
    with pytest.raises(UserError, match=changed.name):
        source.read_batch([1, 9])
    cut.write_bytes(cut.read_bytes()[:-1])
    lost.unlink()
    with pytest.raises(UserError, match=rf"(?s)2 of 3 shards .*{cut.name} has .* instead of .*{lost.name} is missing"):
        latents.load(config(output))
    problems = shards.damaged_shards(output, manifest)
    assert [path.name for path in (cut, lost, changed) for problem in problems if path.name in problem] == [
        cut.name, lost.name, changed.name,
    ]  # fmt: skip
    assert "checksum" in problems[2]


def test_manifest_that_is_none(folder, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a manifest of prepared latents"):
        shards.read_manifest(tmp_path)
    values = json.loads((folder / "manifest.json").read_text())
    values["vae"]["scaling_factor"] = 1.0
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"contradicts"):
        shards.read_manifest(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][0].update(file="../out/x.arrayrecord"), "is no file of this folder"),
        (lambda m: m["shards"][0].update(file="/etc/passwd"), "is no file of this folder"),
        (lambda m: m["shards"][0].update(file=".."), "is no file of this folder"),
        (lambda m: m["shards"][0].update(file=7), "is no file of this folder"),
        (lambda m: m["shards"][0].update(examples=-1), "examples -1 is no whole number from 0"),
        (lambda m: m["shards"][0].update(examples=10**9), "examples 1000000000 is no whole number from 0 to"),
        (lambda m: m["shards"][0].update(examples=True), "examples True is no whole number"),
        (lambda m: m["shards"][0].update(bytes="many"), "bytes 'many' is no whole number"),
        (lambda m: m["shards"][0].update(extra=1), "extra"),
        (lambda m: m["shards"].append(m["shards"][0]), "names a shard twice"),
        (lambda m: m.update(shards=None), "not iterable"),
        (lambda m: m.update(num_classes=0), "num_classes 0 is no whole number from 1"),
        (lambda m: m.update(num_classes=2.5), "num_classes 2.5 is no whole number"),
        (lambda m: m.update(class_names=["a"]), "class_names are not 3 names"),
        (lambda m: m.update(latent_shape=[4, 4]), "is not height, width, channels"),
        (lambda m: m.update(latent_shape=[4, 4, 10**9]), "latent_shape 1000000000 is no whole number"),
        (lambda m: m.update(settings=[1]), "sequence"),
        (lambda m: m.update(format="sra-jax latents, version 2"), "version 2.*this version reads"),
        (lambda m: m["vae"].update(config=[]), "block_out_channels"),
        (lambda m: m.update(skipped=[1]), "int"),
    ],
)
def test_edited_and_foreign_manifests(change, message, folder, tmp_path):
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as caught:
        latents.load(config(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[]", b'{"format": 1}'])
def test_files_that_are_no_manifest(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json (is not a manifest|cannot be read)"):
        shards.read_manifest(tmp_path)


@pytest.mark.faults
def test_pipes_and_folders_in_the_place_of_shards(folder, tmp_path):
    output = shutil.copytree(folder, tmp_path / "out")
    first, second, _ = (output / shard.file for shard in shards.read_manifest(output).shards)
    first.unlink()
    second.unlink()
    os.mkfifo(first)
    second.mkdir()
    with pytest.raises(UserError, match=r"(?s)2 of 3 shards are damaged.*is no file.*is no file"):
        latents.load(config(output))


@pytest.mark.faults
def test_damaged_records_of_progress(moments, tiny_vae, folder, tmp_path):
    """That of a shard: it is made again. The settings: nobody knows what the shards are, so nothing is touched."""
    output = shutil.copytree(folder, tmp_path / "out")
    (output / "progress" / "00001.json").write_text('{"shard": {"file": "../../x"')
    assert prepare_moments(moments, tiny_vae, output).examples == 4
    for file in sorted(folder.glob("*.arrayrecord")):
        assert (output / file.name).read_bytes() == file.read_bytes()
    (output / "progress" / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged .*name a new folder"):
        prepare_moments(moments, tiny_vae, output)


@pytest.mark.faults
def test_two_preparations_on_one_folder(moments, tiny_vae, tmp_path):
    """Refused, with who writes there; processes that share the work may, in one division of it."""
    source = MomentsFolder(str(moments[0]))
    maker = MomentsCopier(source, tiny_vae.config)
    refused = []

    class Second:
        latent_shape, settings, load = maker.latent_shape, maker.settings, staticmethod(maker.load)

        @staticmethod
        def moments(batch):
            if not refused:
                for index, count in ((0, 1), (1, 2)):
                    with pytest.raises(UserError, match=rf"by process {os.getpid()} on .*choose another --output") as e:
                        prepare_moments(moments, tiny_vae, tmp_path / "out", process_index=index, process_count=count)
                    refused.append(e)
            return maker.moments(batch)

    report = prepare(
        source, Second, str(tmp_path / "out"), source_name=f"edm2:{moments[0]}", vae_name=str(tiny_vae.folder),
        vae_fingerprint=None, vae_config=tiny_vae.config, dtype="float32", batch_size=2, shard_size=4,
    )  # fmt: skip
    assert report.complete
    assert len(refused) == 2
    assert not list((tmp_path / "out" / "progress").glob(".*"))


@pytest.mark.parametrize("name", [".DS_Store", "lost+found"])
def test_a_new_disk_s_own_entries_are_no_foreign_files(name, moments, tiny_vae, tmp_path):
    (tmp_path / name).mkdir()
    assert prepare_moments(moments, tiny_vae, tmp_path).complete


@pytest.mark.faults
@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (np.nan, "float32", "holds NaN or infinite values"),
        (np.inf, "bfloat16", "holds NaN or infinite values"),
        (1e6, "float16", "beyond the range of float16: choose another --dtype"),
    ],
)
def test_latents_that_are_not_finite_are_left_out(value, dtype, reason, moments, tiny_vae, tmp_path):
    source = shutil.copytree(moments[0], tmp_path / "edm2")
    array = np.load(source / "005.npy")
    array[1, 2, 3] = value
    np.save(source / "005.npy", array)
    told = []
    report = prepare_moments((source,), tiny_vae, tmp_path / "out", dtype, on_skip=lambda *said: told.append(said))
    assert [(name, text[-len(reason) :]) for name, text in report.skipped] == [(str(source / "005.npy"), reason)]
    assert told == report.skipped
    assert report.examples == EXAMPLES - 1
    assert shards.damaged_shards(tmp_path / "out", shards.read_manifest(tmp_path / "out")) == []


@pytest.mark.faults
def test_a_set_of_which_nothing_can_be_used(moments, tiny_vae, tmp_path):
    source = shutil.copytree(moments[0], tmp_path / "edm2")
    for i in range(EXAMPLES):
        np.save(source / f"{i:03}.npy", np.full((8, 4, 4), np.nan if i else 1, np.float32))
    (source / "000.npy").write_bytes((source / "001.npy").read_bytes())
    with pytest.raises(UserError, match=r"000\.npy, the first of .* cannot be read: holds NaN"):
        prepare_moments((source,), tiny_vae, tmp_path / "out")
    np.save(source / "000.npy", np.full((8, 4, 4), 1e30, np.float32))
    with pytest.raises(RunError, match=r"none of 11 images could be used; the first, .*\.npy: holds NaN"):
        prepare_moments((source,), tiny_vae, tmp_path / "out", "float16")


@pytest.fixture
def spoilt(moments, tiny_vae, tmp_path, monkeypatch):
    """Latents as they might come from elsewhere: record 2 of shard 1 holds a NaN, record 1 of shard 2 the label 7."""
    to_bytes = shards.RecordLayout.to_bytes
    written = itertools.count()

    def spoil(self, array, label):
        number = next(written)
        if number == 6:
            array = np.where(np.arange(array.size).reshape(array.shape) == 9, np.nan, array)
        return to_bytes(self, array, 7 if number == 9 else label)

    monkeypatch.setattr(shards.RecordLayout, "to_bytes", spoil)
    prepare_moments(moments, tiny_vae, tmp_path / "out")
    monkeypatch.undo()
    return tmp_path / "out"


@pytest.mark.faults
def test_verify_names_examples_that_no_model_can_learn_from(spoilt):
    manifest = shards.read_manifest(spoilt)
    paths = [spoilt / shard.file for shard in manifest.shards]
    assert shards.damaged_shards(spoilt, manifest) == [
        f"{paths[1]}, record 2 (example 6), holds NaN or infinite values",
        f"{paths[2]}, record 1 (example 9), has the label 7, classes run from 0 to 2",
    ]


@pytest.mark.faults
def test_training_names_the_example_that_made_its_loss_nan(spoilt):
    """Looked for only when a loss was not finite: the batch is read once more."""
    source = latents.load(config(spoilt)).source
    order = pipeline.epoch_order(EXAMPLES, 1, 0)
    batch = int(np.flatnonzero(order == 6)[0]) // 2
    path = spoilt / shards.read_manifest(spoilt).shards[1].file
    read = {"batch_size": 2, "seed": 1, "rows": range(2)}
    assert pipeline.non_finite(source, **read, batch=batch) == [f"{path}, record 2 (example 6)"]
    clean = [i for i in range(5) if i != batch and 9 not in order[2 * i : 2 * i + 2]]
    assert not any(pipeline.non_finite(source, **read, batch=i) for i in clean)
    for read_nine in (lambda: source[9], lambda: source.read_batch([0, 9])):
        with pytest.raises(UserError, match=r"record 1 \(example 9\) has the label 7, classes run from 0 to 2"):
            read_nine()


@pytest.mark.faults
def test_more_shards_than_files_may_be_open(moments, tiny_vae, tmp_path):
    """A process that may open few files reads all shards, in batches and one by one, and leaves room for others."""
    source = MomentsFolder(str(moments[0]))
    prepare(
        source, MomentsCopier(source, tiny_vae.config), str(tmp_path / "out"), source_name="edm2", vae_name="vae",
        vae_fingerprint=None, vae_config=tiny_vae.config, dtype="float32", batch_size=2, shard_size=1,
    )  # fmt: skip
    program = f"""
import contextlib, os, resource
import numpy as np
from sra_jax.data import latents, record_files, shards
from sra_jax.errors import UserError
arguments = {str(tmp_path / 'out')!r}, shards.read_manifest({str(tmp_path / 'out')!r})
source = latents.LatentSource(*arguments)
opened = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 12, opened + 12))
assert 1 <= record_files.room_for_files(len(source)) < len(source)
order = np.random.default_rng(0).permutation(len(source))
for _ in range(3):
    labels = source.read_batch(order)["label"]
np.testing.assert_array_equal(labels, [source[i]["label"] for i in order.tolist()])
others = [open(os.devnull) for _ in range(5)]
source.read_batch(range(len(source)))
fresh = latents.LatentSource(*arguments)
with contextlib.suppress(OSError):
    while True:
        others.append(open(os.devnull))
source[0]
source.read_batch(range(len(source)))
try:
    fresh.read_batch([0])
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"this process has as many files open as it may, \d+: raise the limit, ulimit -n", done.stdout)


def test_decoder_undoes_the_scaling_and_truncates(folder, tiny_vae):
    drawn = jnp.asarray(np.random.default_rng(0).normal(size=(3, *SHAPE)), jnp.float32)
    vae = vae_interop.load(str(tiny_vae.folder))
    images = np.asarray(latents.decoder(config(folder))(drawn))
    expected = np.clip((np.asarray(vae.decode(drawn / 0.5)) + 1) / 2 * 255, 0, 255)
    assert (images.shape, images.dtype) == ((3, 8, 8, 3), np.uint8)
    assert (images == np.floor(expected)).mean() > 0.99
    assert np.abs(images - np.floor(expected)).max() <= 1
    # without the latents, from the VAE that the config names
    np.testing.assert_array_equal(latents.decoder(config("", vae=str(tiny_vae.folder)))(drawn), images)


def test_decoder_of_another_scaling(folder, tiny_vae, tmp_path):
    other = shutil.copytree(tiny_vae.folder, tmp_path / "vae")
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"scaling_factor": 0.18215}))
    with pytest.raises(UserError, match=r"has scaling_factor=0.18215, but the latents in .* scaling_factor=0.5"):
        latents.decoder(config(folder, vae=str(other)))
    with pytest.raises(UserError, match=r"neither data.vae nor data.path"):
        latents.decoder(config(""))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 4, 4), np.float32)[:7], "not moments"),
        (np.full((8, 4, 4), -1, np.float32), "no standard deviation"),
        (LYING_HEADER, "skipped"),
        (np.zeros((8, 6, 6), np.float32), "have shape"),
        (b"no array", "skipped"),
    ],
)
def test_damaged_moments_are_skipped_and_listed(array, message, moments, tiny_vae, tmp_path):
    source = shutil.copytree(moments[0], tmp_path / "edm2")
    if isinstance(array, bytes):
        (source / "005.npy").write_bytes(array)
    else:
        np.save(source / "005.npy", array)
    report = prepare_moments((source,), tiny_vae, tmp_path / "out")
    assert [name for name, _ in report.skipped] == [str(source / "005.npy")]
    assert message in report.skipped[0][1] or message == "skipped"
    manifest = shards.read_manifest(tmp_path / "out")
    assert (manifest.examples, manifest.skipped) == (EXAMPLES - 1, tuple(report.skipped))
    np.testing.assert_array_equal(
        latents.load(config(tmp_path / "out")).source.read_batch(range(10))["label"], np.delete(moments[3], 5)
    )


def test_folder_with_other_settings_or_files(moments, tiny_vae, folder, tmp_path):
    with pytest.raises(UserError, match=r"dtype='float16', before 'float32'"):
        prepare_moments(moments, tiny_vae, folder, "float16")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no latents"):
        prepare_moments(moments, tiny_vae, tmp_path)


def test_moments_folder_errors(tmp_path):
    with pytest.raises(UserError, match=r"has no dataset\.json"):
        MomentsFolder(str(tmp_path))
    for text in ('{"labels": null}', "nothing", "[]"):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=r"does not hold"):
            MomentsFolder(str(tmp_path))
    (tmp_path / "dataset.json").write_text('{"labels": []}')
    with pytest.raises(UserError, match=r"lists no example"):
        MomentsFolder(str(tmp_path))
    (tmp_path / "dataset.json").write_text('{"labels": [["absent.npy", 0]]}')
    with pytest.raises(UserError, match=r"absent\.npy, the first of .* cannot be read"):
        MomentsFolder(str(tmp_path))
