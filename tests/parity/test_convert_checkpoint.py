"""tools/convert_checkpoint.py on .pt files, and the goldens through it."""

import argparse
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from sra_jax.errors import UserError
from sra_jax.interop.pytorch import params_from_pytorch, pytorch_from_params
from sra_jax.interop.tensor_files import open_tensor_file
from sra_jax.runs.checkpoints import Checkpoints
from sra_jax.runs.state import Networks, TrainState, init_state, make_optimizer
from sra_jax.runs.trained import TrainedModel
from tests.conftest import run
from tests.interop.random_tensors import random_tensors
from tests.parity.stored import blocks as stored_blocks

TOOL = "tools/convert_checkpoint.py"


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


# ---------------------------------------------------------------- goldens; no PyTorch needed


def through_the_converter(arrays, prefix, latents, recipe, folder):
    """A golden state dict as a safetensors file, converted to a run; the run's model."""
    tensors = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    meta = json.loads(str(arrays["meta/config"]))
    save_file(tensors, folder / "golden.safetensors")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
    run(
        TOOL, f"--checkpoint={folder / 'golden.safetensors'}", f"--workdir={folder / 'run'}", f"--config={recipe}",
        f"--config.data.image_size={latents.shape[-1]}", f"--config.data.channels={channels}",
        f"--config.data.num_classes={classes}", f"--config.model.patch={patch}", f"--config.model.width={width}",
        f"--config.model.depth={meta['depth']}", f"--config.model.heads={meta['num_heads']}",
        "--config.alignment.student_block=1", "--config.alignment.teacher_block=1",
    )  # fmt: skip
    return TrainedModel(folder / "run"), tensors


@pytest.mark.parametrize(
    ("name", "recipe", "inputs", "blocks", "output", "tolerance"),
    [
        pytest.param("sit_forward", "configs/sit_b2.py:smoke", "in", "feat", "out/v", 1e-5, id="sit_forward"),
        pytest.param("dit_loss", "configs/dit_b2.py:smoke", "fwd", "fwd", "fwd/out", 3e-5, id="dit_loss"),
    ],
)
def test_golden_forward(golden, tmp_path, name, recipe, inputs, blocks, output, tolerance):
    """Prediction and tokens after every block, of sit_forward and dit_loss, from a converted file."""
    arrays = golden(name)
    model, tensors = through_the_converter(arrays, "sd/", arrays[f"{inputs}/x"], recipe, tmp_path)
    stored = stored_blocks(arrays, f"{blocks}/block_#")
    x, t, y = nhwc(arrays[f"{inputs}/x"]), jnp.asarray(arrays[f"{inputs}/t"]), jnp.asarray(arrays[f"{inputs}/y"])
    prediction, tokens = model.networks.model(model.params)(x, t, y, taps=tuple(stored))
    expected = {output: np.moveaxis(prediction, -1, 1)}
    expected |= {f"{blocks}/block_{i}": np.asarray(h) for i, h in zip(stored, tokens, strict=True)}
    for key, found in expected.items():
        np.testing.assert_allclose(found, arrays[key], rtol=0, atol=tolerance * np.abs(arrays[key]).max(), err_msg=key)

    exported = tmp_path / "exported.safetensors"
    run(TOOL, f"--workdir={tmp_path / 'run'}", "--export=params", f"--output={exported}")
    again = open_tensor_file(exported)
    assert again.shapes.keys() == tensors.keys()
    for key, found in zip(tensors, again.read("params", list(tensors)), strict=True):
        np.testing.assert_array_equal(found, tensors[key], err_msg=key)


# ---------------------------------------------------------------- .pt files


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def trained(torch, tmp_path_factory):
    """A checkpoint as the authors' code saves it, after three AdamW steps on random gradients; and the fourth step."""
    model = {k: torch.nn.Parameter(torch.tensor(v), k != "pos_embed") for k, v in random_tensors(0).items()}
    ema = {f"module.{k}": torch.tensor(v) for k, v in random_tensors(1).items()}
    optimizer = torch.optim.AdamW(list(model.values()), lr=1e-4, weight_decay=0.0)
    generator = np.random.default_rng(2)

    def step():
        gradients = {k: 1e-3 * generator.standard_normal(p.shape).astype(np.float32) for k, p in model.items()}
        for name, parameter in model.items():
            parameter.grad = torch.tensor(gradients[name]) if parameter.requires_grad else None
        optimizer.step()
        return gradients

    for _ in range(3):
        step()
    arguments = argparse.Namespace(
        block_out_s=1, block_out_t=2, t_max=0.15, loss_type="cos", path_type="linear", learning_rate=1e-4,
        adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, adam_weight_decay=0.0, max_grad_norm=100.0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("authors") / "step-5.pt"
    torch.save(
        {"model": {k: p.detach() for k, p in model.items()}, "ema": ema, "opt": optimizer.state_dict(),
         "args": arguments, "epoch": 1, "steps": 5},
        path,
    )  # fmt: skip
    saved = {k: p.detach().numpy().copy() for k, p in model.items()}
    gradients = step()
    return path, saved, gradients, {k: p.detach().numpy() for k, p in model.items()}


@pytest.fixture(scope="module")
def imported(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imported") / "run"
    done = run(TOOL, f"--checkpoint={trained[0]}", f"--workdir={workdir}", "--heads=4")
    assert "optimizer state: taken over, 3 updates" in done.stdout
    assert "checkpoint of step 5" in done.stdout
    return workdir


def test_weights_and_settings_of_a_training_checkpoint(trained, imported):
    saved = trained[1]
    for weights, tensors in (("params", saved), ("ema", random_tensors(1))):
        model = TrainedModel(imported, weights=weights)
        assert model.step == 5
        for name, tensor in pytorch_from_params(model.params, 4, 8).items():
            np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    alignment = model.config.alignment
    assert (alignment.student_block, alignment.teacher_block, alignment.interval) == (1, 2, (0.0, 0.15))
    assert (alignment.distance, alignment.weight, alignment.weight_schedule) == ("cosine_tokens", 0.5, "constant")
    assert model.config.optimizer.clip_norm == 100.0


def test_the_next_update_is_torch_s(trained, imported):
    """AdamW's fourth step, of about 1e-4, from the converted moments equals that of the optimizer that was saved."""
    _, _, gradients, after = trained
    config = TrainedModel(imported).config
    networks, optimizer = Networks(config), make_optimizer(config, config.steps)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(lambda: init_state(networks, optimizer, jax.random.key(0)))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    checkpoints = Checkpoints(imported, read_only=True)
    state: TrainState = checkpoints.restore(abstract, 5)[0]
    checkpoints.close()
    updates, _ = optimizer.update(params_from_pytorch(gradients, 4), state.opt_state, state.params)
    for name, found in pytorch_from_params(optax.apply_updates(state.params, updates), 4, 8).items():
        if name != "pos_embed":
            np.testing.assert_allclose(found, after[name], rtol=0, atol=1e-7, err_msg=name)


def test_export_as_pt(torch, imported, tmp_path):
    """What load_state_dict(strict=True) needs: the same names, shapes and values."""
    output = tmp_path / "out.pt"
    run(TOOL, f"--workdir={imported}", "--export=both", f"--output={output}")
    content = torch.load(output, weights_only=True)
    assert content.keys() == {"model", "ema", "steps"}
    assert content["steps"] == 5
    for name, tensor in random_tensors(1).items():
        np.testing.assert_array_equal(content["ema"][name].numpy(), tensor, err_msg=name)
    assert content["model"].keys() == random_tensors(1).keys()


class Code:
    """A pickle that runs a command when it is read."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def test_no_code_of_a_file_is_run(torch, tmp_path):
    witness = tmp_path / "witness"
    torch.save({"model": {"a": torch.ones(3)}, "args": Code(witness)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Code(witness)))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match=r"would run code or make objects \(posix\.system\).*nothing of it was run"):
        open_tensor_file(tmp_path / "zip.pt")
    with pytest.raises(UserError, match="nothing was run"):
        open_tensor_file(tmp_path / "plain.pt")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_tensor_file(tmp_path / "module.pt")
    assert not witness.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_files_cut_short(torch, tmp_path, zipped):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save({"a": torch.ones(1000)}, whole, _use_new_zipfile_serialization=zipped)
    assert open_tensor_file(whole).shapes == {"a": (1000,)}
    for share in (0.0, 0.3, 0.9):
        cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        with pytest.raises(UserError, match="is not a whole PyTorch checkpoint"):
            open_tensor_file(cut)


def test_contents_that_are_no_checkpoint(torch, tmp_path):
    no_weights = {"epoch": 3, "loss": 0.1}
    for content, message in (([1, 2], "holds a list"), (no_weights, r"epoch \(int\), loss \(float\)")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            open_tensor_file(tmp_path / "x.pt")


def test_an_optimizer_of_another_model_is_refused(torch, trained, tmp_path):
    content = torch.load(trained[0], weights_only=False)
    content["opt"]["param_groups"][0]["params"].pop()
    content["opt"]["param_groups"][0]["params"].pop()
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="--fresh_optimizer"):
        open_tensor_file(tmp_path / "x.pt")


@pytest.mark.faults
@pytest.mark.parametrize("steps", ["steps", "step", "global_step", "train_steps"])
def test_steps_by_any_name_and_as_a_tensor(torch, tmp_path, steps):
    for value in (7, torch.tensor(7), torch.tensor([7.0])):
        torch.save({"model": {"a": torch.ones(3)}, steps: value}, tmp_path / "x.pt")
        assert open_tensor_file(tmp_path / "x.pt").step == 7


@pytest.mark.faults
def test_checkpoints_of_training_frameworks(torch, tmp_path):
    """Lightning's: model and EMA in one state dict; torch.compile within DistributedDataParallel."""
    state = {"net._orig_mod.a": torch.ones(3), "ema_model.a": torch.zeros(3)}
    torch.save({"state_dict": state, "global_step": 9, "hyper_parameters": {"num_classes": 10}}, tmp_path / "x.ckpt")
    file = open_tensor_file(tmp_path / "x.ckpt")
    assert (file.groups, file.step, file.arguments) == (("params", "ema"), 9, {"num_classes": 10})
    assert (file.read("params", ["a"])[0].sum(), file.read("ema", ["a"])[0].sum()) == (3, 0)
    torch.save({"model": {"module._orig_mod.a": torch.ones(3)}, "ema": {"ema_model.a": torch.zeros(3)}},
               tmp_path / "y.pt")  # fmt: skip
    file = open_tensor_file(tmp_path / "y.pt")
    assert file.groups == ("params", "ema")
    assert file.read("ema", ["a"])[0].sum() == 0
