import importlib.util
import json

import pytest

from sra_jax.distributed.chips import parse_slice
from sra_jax.errors import UserError
from tests.conftest import TINY_DIGITS, run

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install 'jax[tpu]'")
SMALL = (*TINY_DIGITS, "--config.dtype=bfloat16", "--config.batch_size=64")


@needs_libtpu
def test_report_of_a_train_step(tmp_path):
    path = tmp_path / "report.json"
    done = run("tools/compile_tpu.py", *SMALL, "--topology=v5e:2x2", "--config.mesh.fsdp=4", f"--json={path}")
    assert done.stdout.splitlines()[-1] == "fits: yes"
    report = json.loads(path.read_text())
    assert report["devices"] == 4
    assert report["mesh"] == {"data": 1, "fsdp": 4, "model": 1}
    assert report["unknown_loops"] == 0
    # the recipe rematerialises every block: one forward pass more than the model's arithmetic
    assert 1.1 < report["flops"] / report["model_flops"]["total"] < 1.35
    assert report["sent_bytes"]["all-gather"] > 0
    assert report["peak_bytes"] == sum(report["memory_bytes"].values()) < report["hbm_bytes"]


@needs_libtpu
def test_what_does_not_fit():
    """A state of some 60 GB on one chip of 16."""
    done = run("tools/compile_tpu.py", *SMALL, "--topology=v5e:1x1", "--config.model.width=8192", code=3)
    assert done.stdout.splitlines()[-1] == "fits: no"


@needs_libtpu
def test_search_where_nothing_fits(tmp_path):
    """The state alone is too large however it is split; the compiler is asked for the last mesh only."""
    path = tmp_path / "search.json"
    done = run(
        "tools/compile_tpu.py", *SMALL, "--topology=v5e:2x2", "--config.model.width=16384", "--search",
        f"--json={path}", code=3,
    )  # fmt: skip
    assert "fsdp=1, model=1: left out, the state alone takes" in done.stdout
    assert done.stdout.splitlines()[-1] == "fits: no"
    found = json.loads(path.read_text())
    assert {tried["mesh"]["fsdp"] for tried in found["tried"]} == {4}
    assert not found["report"]["fits"]


@needs_libtpu
def test_search_leaves_out_what_cannot_be_faster(tmp_path):
    """On one chip there is one mesh; where each policy fits at once, no accumulation is tried."""
    path, results = tmp_path / "search.json", tmp_path / "results"
    flags = ("--topology=v5e:1x1", "--search", f"--json={path}", f"--results={results}")
    done = run("tools/compile_tpu.py", *SMALL, *flags)
    found = json.loads(path.read_text())
    assert [(tried["remat"], tried["accumulation"]) for tried in found["tried"]] == [
        ("none", 1), ("dots", 1), ("block", 1)
    ]  # fmt: skip
    assert found["report"] == min(found["tried"], key=lambda report: report["step_seconds"]["in_turn"])
    assert f"--config.model.remat={found['report']['remat']}" in done.stdout
    kept = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    assert len(kept) == 3
    run("tools/compile_tpu.py", *SMALL, *flags)
    assert kept == {path: path.stat().st_mtime_ns for path in results.iterdir()}  # read, not made again


@needs_libtpu
def test_over_two_slices_the_sums_of_gradients_cross_once(tmp_path):
    """Each device sends its part of the gradients once, in bfloat16 as they are made, and little else."""
    path = tmp_path / "report.json"
    flags = (*SMALL, "--config.model.width=256", "--topology=v5e:2x2", "--slices=2", f"--json={path}")
    done = run("tools/compile_tpu.py", *flags, "--config.mesh.fsdp=4")
    report = json.loads(path.read_text())
    assert (report["topology"], report["mesh"]) == ("2 x v5e:2x2", {"data": 2, "fsdp": 4, "model": 1})
    crossing = sum(report["sent_to_other_slices_bytes"].values())
    assert crossing == pytest.approx(report["state_bytes"]["params"] / 2, rel=0.1)
    assert crossing < sum(report["sent_bytes"].values()) / 2
    assert "over the network between them, which the times leave out" in done.stdout
    refused = run("tools/compile_tpu.py", *flags, "--config.mesh.fsdp=8", code=2)
    assert "mesh.data=1 cannot be divided among 2 slices" in refused.stderr


@needs_libtpu
def test_implementations_of_attention_side_by_side(tmp_path):
    """256 tokens, heads of 16: the fused kernel has the same arithmetic and less traffic, and no one is told apart by
    memory that it does not have."""
    path = tmp_path / "table.json"
    done = run(
        "tools/compile_tpu.py", *SMALL, "--topology=v5e:2x2", "--config.model.patch=1", "--config.data.image_size=16",
        "--config.data.name=synthetic", "--attention=plain,flash", "--remat=dots", f"--json={path}",
    )  # fmt: skip
    plain, flash = json.loads(path.read_text())
    assert [(one["attention"], one["tokens"], one["fits"]) for one in (plain, flash)] == [
        ("plain", 256, True), ("flash", 256, True)
    ]  # fmt: skip
    assert flash["flops"] == pytest.approx(plain["flops"], rel=0.05)
    assert flash["memory_traffic_bytes"] < plain["memory_traffic_bytes"]
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--attention=plain,cudnn", "model.attention=cudnn runs on NVIDIA GPUs of the Ampere generation or newer, and"),
        ("--attention=pallas", "allowed: auto, cudnn, flash, splash, plain"),
        ("--remat=some", "allowed: none, gelu, dots"),
    ],
)  # fmt: skip
def test_comparisons_that_cannot_be_made(flag, message):
    done = run("tools/compile_tpu.py", *SMALL, "--topology=v5e:2x2", flag, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_it_says_how_to_get_it():
    done = run("tools/compile_tpu.py", *SMALL, "--topology=v5e:2x2", code=2)
    assert "pip install 'libtpu==" in done.stderr
    assert "Traceback" not in done.stderr


def test_lowering_for_cuda():
    done = run("tools/compile_tpu.py", *SMALL, "--platform=cuda", "--devices=4", "--config.mesh.fsdp=2")
    assert "lowered for 4 GPU(s)" in done.stdout
    assert "mesh              data=2, fsdp=2, model=1" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fits: unknown")


@pytest.mark.parametrize(
    ("text", "name", "size"),
    [
        ("v5e:4x4", "v5e:4x4", 16), ("v5e-16", "v5e:4x4", 16), ("v5e-256", "v5e:16x16", 256), ("v4-8", "v4:2x2x1", 4),
        ("v4-32", "v4:2x2x4", 16), ("v5p-16", "v5p:2x2x2", 8), ("v6e-16", "v6e:4x4", 16),
    ],
)  # fmt: skip
def test_slices(text, name, size):
    """Accelerator names of v4 and v5p count cores, of which a chip has two."""
    wanted = parse_slice(text)
    assert (wanted.name, wanted.size) == (name, size)


@pytest.mark.parametrize("text", ["v9:4x4", "v5e", "v5e-17", "4x4", "v5e:0x4", "v5e:٤x4", "v5e-٤", "v5e:99999x9"])
def test_unknown_slices(text):
    with pytest.raises(UserError, match="allowed"):
        parse_slice(text)
