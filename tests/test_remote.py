"""Addresses in place of paths, by memory:// and by a hub on loopback; buckets: tests/test_buckets.py."""

import hashlib
import json
import os
import struct

import numpy as np
import pytest
from tensorboard.compat.proto import event_pb2

from sra_jax import files, remote
from sra_jax.errors import UserError
from sra_jax.runs import events, metrics
from tests import memory_scheme
from tests.hub import Hub, hub  # noqa: F401

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(request):
    """An empty folder at an address."""
    name = f"memory://{request.node.name.partition('[')[0]}"
    yield remote.path(name)
    if memory_scheme.FILES.exists(name):
        memory_scheme.FILES.rm(name, recursive=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SRA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_whole_files_go_there_and_come_back(folder, cache):
    files.write_text(folder / "a" / "text", "words\n")
    assert files.read_text(folder / "a" / "text") == "words\n"
    files.write_npz(folder / "b.npz", {"x": np.arange(3)})
    with np.load(files.local(folder / "b.npz")) as arrays:
        np.testing.assert_array_equal(arrays["x"], [0, 1, 2])
    assert files.size(folder / "b.npz") == files.local(folder / "b.npz").stat().st_size
    assert sorted(os.path.relpath(path, folder) for path in remote.walk(folder)) == ["a/text", "b.npz"]
    with pytest.raises(ZeroDivisionError), files.whole(folder / "c") as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert not files.exists(folder / "c")
    files.move_folder(folder / "a", folder / "d")
    assert files.read_text(folder / "d" / "text") == "words\n"
    assert not files.exists(folder / "a")


def test_outputs_are_checked_before_any_work(folder):
    files.write_text(folder / "old", "x")
    assert files.check_output("--output", str(folder / "new")) == folder / "new"
    with pytest.raises(UserError, match=r"--output=memory://.*/old exists and is not overwritten"):
        files.check_output("--output", folder / "old")
    files.check_output("--output", folder / "old", overwrite=True)
    assert [path.name for path in remote.walk(folder)] == ["old"]  # nothing of the check is left
    with pytest.raises(UserError, match="hf://a/b/c is only read here"):
        files.check_output("--output", "hf://a/b/c")


def test_copies_are_made_once_and_again_when_the_object_is_another(folder, cache, capsys):
    files.write_text(folder / "x", "one")
    copy = files.local(folder / "x")
    assert copy.read_text() == "one"
    copy.write_text("two")  # by its note it is still the object's
    files._copies.clear()
    assert files.local(folder / "x").read_text() == "two"
    copy.write_text("cut short")
    files._copies.clear()
    assert files.local(folder / "x").read_text() == "one"
    files.write_text(folder / "x", "three")
    assert files.local(folder / "x").read_text() == "three"
    with pytest.raises(UserError, match=r"memory://.*/nothing does not exist"):
        files.local(folder / "nothing")
    assert not list(cache.rglob("*.partial"))


def test_a_folder_of_copies_with_checksums(folder, cache, tmp_path):
    shards = {"a": b"1" * 1000, "b": b"2" * 2000}
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    listed = [(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in shards.items()]
    copies = files.local_folder(folder, listed, tmp_path / "fast disk")
    assert {path.name: path.read_bytes() for path in copies.iterdir() if path.name in shards} == shards
    assert files.local_folder(tmp_path, listed) == tmp_path
    (folder / "b").write_bytes(b"3" * 2000)
    files._copies.clear()
    with pytest.raises(UserError, match="another checksum than was written"):
        files.local_folder(folder, listed, tmp_path / "other")
    assert not (tmp_path / "other" / "memory" / folder.name / "b").exists()


def test_a_log_grows_and_loses_nothing_that_was_saved(folder):
    writer = metrics.Writer(folder)
    writer.write(1, {"loss": 2.0})
    writer.sync()
    writer.write(2, {"loss": 1.0})
    assert [record["step"] for record in metrics.read(folder)] == [1]  # what a kill would leave
    writer.close()
    writer = metrics.Writer(folder)
    writer.write(3, {"loss": 0.5})
    writer.close()
    assert [record["step"] for record in metrics.read(folder)] == [1, 2, 3]
    metrics.keep_until(folder, 2)
    assert [record["step"] for record in metrics.read(folder)] == [1, 2]


def logged(content):
    """(step, name, value) of every scalar in an event file: records of length, checksum, bytes, checksum."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        yield from ((event.step, value.tag, value.tensor.float_val[0]) for value in event.summary.value)
        content = content[16 + length :]


def test_events_are_those_of_a_local_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(events, "OBJECT_BYTES", 300)
    for place in (folder, tmp_path / "local"):
        writer = events.Writer(place)
        for step in range(5):
            writer.write_scalars(step, {"loss": step / 2})
        writer.close()
    assert len(list(folder.iterdir())) > 1  # begun anew as it grows
    assert len(list((tmp_path / "local").iterdir())) == 1
    found = []
    for place in (folder, tmp_path / "local"):
        parts = sorted(place.iterdir(), key=lambda path: path.name)
        found.append([scalar for part in parts for scalar in logged(part.read_bytes())])
    assert found[0] == found[1] == [(step, "loss", step / 2) for step in range(5)]


def test_a_lock_is_an_object_that_names_its_owner(folder, monkeypatch):
    monkeypatch.setattr(files, "LOCK_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(files, "LOCK_STALE_SECONDS", 2)
    with files.locked(folder, "choose another") as lock:
        with (
            pytest.raises(UserError, match=r"is being written by process .* choose another"),
            files.locked(folder, "choose another"),
        ):
            pass
        lock.check()
    assert not files.exists(folder / ".lock")
    gone = files._record() | {"pid": 2**22 + 1}  # beyond any process's number
    (folder / ".lock").write_text(json.dumps(gone))
    with files.locked(folder, "choose another"):
        assert json.loads((folder / ".lock").read_text())["id"] != gone["id"]


def test_errors_of_a_storage_say_what_and_where(folder):
    class HttpError(Exception):
        """As gcsfs raises it."""

    HttpError.__module__ = "gcsfs.retry"
    with pytest.raises(remote.Unreachable, match="403 no access") as caught, remote.asked("gs://b/x"):
        raise HttpError("403 no access")
    assert caught.value.filename == "gs://b/x"
    with pytest.raises(ZeroDivisionError), remote.asked("gs://b/x"):
        raise ZeroDivisionError
    assert str(remote.unreachable("--workdir", "gs://b/x", caught.value)).startswith(
        "--workdir=gs://b/x cannot be reached (403 no access): check its name, the network and your credentials (gcloud"
    )


def test_addresses_that_cannot_work(monkeypatch):
    monkeypatch.setitem(remote.PACKAGES, "s3", "no_such_package")
    for text, message in {
        "s3://b/x": "--path=s3://b/x: s3:// needs the package no_such_package",
        "gs://": "--path=gs:// names no bucket",
        "hf://owner": "hf://owner is no file of Hugging Face",
        "hf://a/b/../c": "is no file of Hugging Face",
        "hf://a/b/c@": "is no file of Hugging Face",
    }.items():
        with pytest.raises(UserError, match=message):
            remote.checked("--path", text)
    assert remote.checked("--path", "gs://bucket/run/") == "gs://bucket/run"


HUB = {
    "hf://a/b/c.pt": ("a/b", "main", "c.pt"),
    "hf://a/b/d/c.pt@v1": ("a/b", "v1", "d/c.pt"),
    "hf://a/b@v1/d/c.pt": ("a/b", "v1", "d/c.pt"),
    "hf://datasets/a/b/c.npz": ("datasets/a/b", "main", "c.npz"),
    "hf://a/b/c.pt@refs/pr/1": ("a/b", "refs/pr/1", "c.pt"),
}


def test_what_an_address_of_the_hub_names():
    for text, parts in HUB.items():
        assert remote.hub_file(text) == parts
    assert remote.inside("hf://a/b", "c") == "hf://a/b/c@main"
    assert remote.inside("hf://a/b/vae@v1", "c") == "hf://a/b/vae/c@v1"
    assert remote.beside("hf://a/b/d/c.pt@v1", "config.json") == "hf://a/b/d/config.json@v1"
    assert remote.beside("x/c.pt", "config.json") == "x/config.json"


def test_files_of_the_hub_are_kept_by_revision(hub, monkeypatch, capsys):  # noqa: F811
    commit = 40 * "a"
    for revision in ("main", "v1", commit):
        hub(f"me/model/resolve/{revision}/d/x", f"of {revision}")
    assert files.local("hf://me/model/d/x").read_text() == "of main"
    assert files.local("hf://me/model/d/x@v1").read_text() == "of v1"
    assert files.local(f"hf://me/model/d/x@{commit}").read_text() == f"of {commit}"
    files._copies.clear()
    hub("me/model/resolve/main/d/x", "of main, later")
    assert files.local("hf://me/model/d/x").read_text() == "of main, later"
    files._copies.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert files.local("hf://me/model/d/x").read_text() == "of main, later"
    assert "the copy here is used" in capsys.readouterr().err
    assert files.local(f"hf://me/model/d/x@{commit}").read_text() == f"of {commit}"
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=r"hf://me/model/y cannot be fetched \(http://127.0.0.1:9: .*refused"):
        files.local("hf://me/model/y")


def test_a_token_opens_what_is_closed_and_goes_to_the_hub_alone(hub, monkeypatch):  # noqa: F811
    hub("me/secret/resolve/main/x", "hidden")
    with pytest.raises(UserError, match=r"answers 401 .*: me/secret may need access, set HF_TOKEN"):
        files.local("hf://me/secret/x")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="HF_TOKEN is not accepted"):
        files.local("hf://me/secret/x")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert files.local("hf://me/secret/x").read_text() == "hidden"
    tokens = {(path.startswith("/bytes/"), token) for _, path, token in Hub.asked[2:]}
    assert tokens == {(False, "Bearer right"), (True, None)}


def test_what_is_not_on_the_hub(hub):  # noqa: F811
    hub("me/model/resolve/main/x", "words")
    with pytest.raises(UserError, match=r"hf://me/model/y@v2 does not exist \(there is no y in me/model at rev.* v2"):
        files.local("hf://me/model/y@v2")
    with pytest.raises(UserError, match="hf://me/model names no file"):
        files.local("hf://me/model")
