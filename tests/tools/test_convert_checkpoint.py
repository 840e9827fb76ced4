"""tools/convert_checkpoint.py as a user runs it, with safetensors files; .pt files are in tests/parity."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sra_jax import config as config_lib
from sra_jax.errors import UserError
from sra_jax.interop.pytorch import pytorch_from_params
from sra_jax.runs.state import Networks, init_state, make_optimizer
from sra_jax.runs.trained import TrainedModel
from sra_jax.runs.warm_start import start_from
from tests.conftest import TINY_DIGITS, run
from tests.hub import hub  # noqa: F401
from tests.in_process import call
from tests.interop.random_tensors import random_tensors

TOOL = "tools/convert_checkpoint.py"
DEMO = tuple(flag for flag in TINY_DIGITS if not flag.startswith("--config.steps"))


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """The tiny run's EMA as a safetensors file."""
    path = tmp_path_factory.mktemp("exported") / "ema.safetensors"
    assert "ema of step 24" in run(TOOL, f"--workdir={tiny_run}", "--export=ema", f"--output={path}").stdout
    return path


@pytest.fixture(scope="module")
def imported(exported, tmp_path_factory):
    """That file as a run again."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    done = run(TOOL, f"--checkpoint={exported}", f"--workdir={workdir}", *DEMO, "--config.steps=4")
    assert "sit (1 output channels), 3 blocks, width 32, 2 heads, patch 2" in done.stdout
    assert "with the head of sra" in done.stdout
    assert "optimizer state: not in the file" in done.stdout
    return workdir


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_out_and_in_again_is_bit_for_bit(tiny_run, imported):
    original = TrainedModel(tiny_run).params
    for weights in ("ema", "params"):
        assert_trees_equal(TrainedModel(imported, weights=weights).params, original)


def test_exported_names_are_the_authors(tiny_run, exported):
    tensors = load_file(exported)
    expected = random_tensors(0, outputs=1, channels=1)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    np.testing.assert_array_equal(tensors["pos_embed"], expected["pos_embed"])


def test_tools_use_an_imported_run(imported, tmp_path):
    run("tools/sample.py", f"--workdir={imported}", "--num_samples=5", f"--output={tmp_path / 'samples.npz'}")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (5, 8, 8, 1)


def test_what_was_published_is_the_run_again(tiny_run, hub, tmp_path):  # noqa: F811
    """--card makes a folder; from a hub its commands bring the same weights and recipe back, and sample from them."""
    folder, workdir = tmp_path / "upload", tmp_path / "run"
    done = run(TOOL, f"--workdir={tiny_run}", "--export=ema", "--card", f"--output={folder}")
    assert f"hf upload OWNER/NAME {folder}" in done.stdout
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    text = (folder / "README.md").read_text()
    _, front, card = text.split("---\n", 2)
    assert "library_name: sra-jax\n" in front
    assert "- sra\n" in front
    for fact in ("# digits", "3 blocks, width 32", "EMA teacher of step 24", "384 examples", "arXiv 2505.02831"):
        assert fact in card
    config = config_lib.read(folder / "config.json")
    assert not any(str(tmp_path) in str(value) for _, value in config_lib.flatten(config))
    for path in folder.iterdir():
        hub(f"me/digits/resolve/main/{path.name}", path.read_bytes())
    commands = [line.split() for line in card.splitlines() if line.startswith("    python tools/")]
    convert, sample = (
        [word.replace("OWNER/NAME", "me/digits").replace("--workdir=W", f"--workdir={workdir}") for word in command[1:]]
        for command in commands
    )
    assert "with the head of sra" in run(*convert).stdout
    theirs, ours = TrainedModel(workdir), TrainedModel(tiny_run)
    assert_trees_equal(theirs.params, ours.params)
    assert not config_lib.differences(ours.config, theirs.config)
    run(*sample, "--sampling_steps=2", f"--output={tmp_path / 'samples.npz'}", folder=tmp_path)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (64, 8, 8, 1)
    done = run(TOOL, f"--workdir={tiny_run}", "--export=ema", "--card", f"--output={folder}", code=2)
    assert "model.safetensors exists and is not overwritten" in done.stderr


def test_training_goes_on_where_the_file_stopped(imported, tmp_path):
    """A file without step and optimizer is a run at step 0."""
    workdir = tmp_path / "run"
    shutil.copytree(imported, workdir)
    done = run("main.py", *DEMO, "--config.steps=4", f"--workdir={workdir}")
    assert f"resuming {workdir} at step 0" in done.stdout
    assert "without checksums" not in done.stdout
    assert (workdir / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize(
    ("method", "head"),
    [("self_flow", "projector.linear1"), pytest.param("dts_as", "ap_head.linear1", marks=pytest.mark.slow)],
)
def test_siblings_go_out_under_their_authors_names_and_come_in_again(method, head, tmp_path):
    """Self-Flow's time and channels are the original SiT's: one rounding each way."""
    flags = (
        f"--config=configs/digits.py:{method}", *DEMO[1:], "--config.steps=2",
        f"--config.method.{method}.student_block=1", f"--config.method.{method}.teacher_block=2",
    )  # fmt: skip
    run("main.py", *flags, f"--workdir={tmp_path / 'run'}")
    output = tmp_path / "ema.safetensors"
    run(TOOL, f"--workdir={tmp_path / 'run'}", "--export=ema", f"--output={output}")
    names = load_file(output)
    assert f"{head}.weight" in names
    assert names["x_embedder.proj.weight"].ndim == (2 if method == "self_flow" else 4)
    done = run(TOOL, f"--checkpoint={output}", f"--workdir={tmp_path / 'again'}", f"--method={method}", *flags)
    assert f"with the head of {method}" in done.stdout
    before, after = TrainedModel(tmp_path / "run").params, TrainedModel(tmp_path / "again").params
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, after)
    run(TOOL, f"--workdir={tmp_path / 'run'}", "--export=ema", "--family=dit", f"--output={tmp_path / 'x.pt'}", code=2)


def test_a_new_run_starts_from_the_ema_of_another(tiny_run, tmp_path):
    """init_from: the model and the head are the other run's EMA, in student and teacher; a new step 0."""
    frozen = ("--config.optimizer.learning_rate=1e-30", "--config.ema.decay=1.0", "--config.steps=1")
    fresh = tmp_path / "fresh"
    done = run("main.py", *DEMO, *frozen, f"--config.init_from={tiny_run}", f"--workdir={fresh}")
    assert f"starting from the EMA and its head of step 24 in {tiny_run}" in done.stdout
    taken = TrainedModel(tiny_run).params
    assert_trees_equal(TrainedModel(fresh).params, taken)
    assert_trees_equal(TrainedModel(fresh, weights="params").params, taken)


def test_a_run_that_cannot_be_started_from(tiny_run, tmp_path):
    config = config_lib.read(tiny_run / "config.json")
    with config.unlocked():
        config.model.width = 64
        config.init_from = str(tiny_run)
    networks, optimizer = Networks(config), make_optimizer(config, 10)
    wider = jax.eval_shape(lambda: init_state(networks, optimizer, jax.random.key(0)))
    with pytest.raises(UserError, match=r"other shapes:\n  blocks/attention/out/bias: \(3, 32\) there, \(3, 64\) here"):
        start_from(config, wider)
    with config.unlocked():
        config.init_from = str(tmp_path)
    with pytest.raises(UserError, match=f"init_from={tmp_path}: no run at"):
        start_from(config, wider)


def test_the_paper_s_recipe_is_chosen_and_resolution_follows_the_file(tmp_path):
    """Without --config; a size that is none of the paper's, REPA's projectors."""
    tensors = random_tensors(3, head=False)
    tensors["projectors.0.0.weight"] = np.zeros((8, 32), np.float32)
    save_file(tensors, tmp_path / "repa.safetensors")
    workdir = tmp_path / "run"
    done = run(TOOL, f"--checkpoint={tmp_path / 'repa.safetensors'}", f"--workdir={workdir}", "--heads=4")
    assert "left out: 1 tensors of training only, such as projectors.0.0.weight" in done.stdout
    model = TrainedModel(workdir)
    assert not model.config.alignment.enabled
    assert (model.config.data.image_size, model.config.data.num_classes) == (8, 10)
    for name, tensor in pytorch_from_params(model.params, 4, 8).items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda tensors: tensors.pop("blocks.1.mlp.fc1.bias"), (), "missing: blocks.1.mlp.fc1.bias"),
        (lambda tensors: tensors.update(pos_embed=tensors["pos_embed"] + 1), (), "pos_embed of params is not"),
        (lambda tensors: None, ("--config=configs/digits.py",), "the config does not describe the file"),
        (lambda tensors: None, ("--export=ema",), "either --checkpoint"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, change, flags, message):
    tensors = random_tensors(4)
    change(tensors)
    save_file(tensors, tmp_path / "weights.safetensors")
    file, workdir = f"--checkpoint={tmp_path / 'weights.safetensors'}", tmp_path / "run"
    done = run(TOOL, file, f"--workdir={workdir}", "--heads=4", *flags, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not workdir.exists()


def test_nothing_is_overwritten(tiny_run, exported):
    tensors = exported.read_bytes()
    assert "exists" in run(TOOL, f"--workdir={tiny_run}", "--export=ema", f"--output={exported}", code=2).stderr
    assert exported.read_bytes() == tensors
    done = run(TOOL, f"--checkpoint={exported}", f"--workdir={tiny_run}", *DEMO, "--config.steps=4", code=2)
    assert "exists and is not empty" in done.stderr


@pytest.mark.faults
def test_a_class_table_without_a_null_label(tmp_path):
    """DiT trained without label dropout: ten rows are ten classes, class 9 among them, and nothing to guide with."""
    tensors = random_tensors(4, outputs=8, head=False, classes=9)
    save_file(tensors, tmp_path / "DiT.safetensors")
    workdir = tmp_path / "run"
    file = tmp_path / "DiT.safetensors"
    done = call("convert_checkpoint", f"--checkpoint={file}", f"--workdir={workdir}", "--heads=4")
    assert "10 classes and no null label (a round number of rows: --num_classes=9" in done.stdout
    model = TrainedModel(workdir)
    assert (model.config.data.num_classes, model.config.model.null_label) == (10, False)
    assert (model.config.label_dropout, model.config.sampling.guidance_scale) == (0.0, 1.0)
    for name, tensor in pytorch_from_params(model.params, 4, 8).items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    output = f"--output={tmp_path / 'x.npz'}"
    done = call("sample", f"--workdir={workdir}", output, "--guidance_scale=1.5", code=2)
    assert "needs a null label, and this model has none" in done.stderr
    done = call("pca", f"--workdir={workdir}", f"--output={tmp_path / 'x.png'}", code=2)
    assert "--condition=null shows the network the null label, which this run was never trained with" in done.stderr


def test_exports_for_training_and_for_sampling(tiny_run, tmp_path):
    def export(purpose, workdir=tiny_run, code=0):
        output = tmp_path / f"{purpose}.safetensors"
        done = call("convert_checkpoint", f"--workdir={workdir}", "--export=ema", f"--output={output}",
                    *([f"--export_for={purpose}"] if purpose else []), "--overwrite", code=code)  # fmt: skip
        return done, load_file(output) if code == 0 else None

    everything = export(None)[1]
    done, tensors = export("training")
    assert "with ap_head: SRA's own classes load it with strict=True" in done.stdout
    assert tensors.keys() == everything.keys()
    done, tensors = export("sampling")
    assert "without ap_head: SRA's SiT loads it with strict=False" in done.stdout
    assert tensors.keys() == {name for name in everything if not name.startswith("ap_head.")}
    save_file(tensors, tmp_path / "bare.safetensors")
    call("convert_checkpoint", f"--checkpoint={tmp_path / 'bare.safetensors'}", f"--workdir={tmp_path / 'bare'}", *DEMO,
         "--config.steps=4", "--config.alignment.enabled=False")  # fmt: skip
    assert "did not train: --export_for=sampling" in export("training", tmp_path / "bare", code=2)[0].stderr
