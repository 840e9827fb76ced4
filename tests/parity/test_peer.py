"""The PyTorch step that tools/benchmark.py measures against does the same arithmetic as ours."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dit_b2, sit_b2
from sra_jax import config as config_lib
from sra_jax.benchmarks import tasks
from sra_jax.benchmarks.peers import PeerStep
from sra_jax.benchmarks.sides import compiler_there
from sra_jax.interop.pytorch import pytorch_from_params
from sra_jax.runs.state import Networks
from sra_jax.training.step import total_loss
from tests.conftest import run


@pytest.mark.parametrize("teacher", ["full", "truncated"])
@pytest.mark.parametrize(
    ("recipe", "t", "s"), [(sit_b2, [0.1, 0.5, 0.9], [0.0, 0.4, 0.8]), (dit_b2, [0, 500, 999], [0, 400, 801])]
)
def test_peer_s_loss_is_ours(recipe, t, s, teacher):
    config = recipe.get_config("smoke")
    networks = Networks(config)
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda x: generator.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    data, model, aligned = config.data, config.model, config.alignment
    peer = PeerStep(
        {
            "input_size": data.image_size, "patch": model.patch, "channels": data.channels, "width": model.width,
            "depth": model.depth, "heads": model.heads, "hidden": 4 * model.width, "classes": data.num_classes,
            "outputs": config_lib.transformer_of(config).output_channels,
        },
        pytorch_from_params(params, data.channels, data.image_size), process=config.process.name,
        student_block=aligned.student_block, teacher_block=aligned.teacher_block, weight=aligned.weight, threads=1,
    )  # fmt: skip
    size = (3, data.image_size, data.image_size, data.channels)
    example = {
        "x0": generator.normal(size=size).astype(np.float32), "e": generator.normal(size=size).astype(np.float32),
        "t": np.array(t, np.float32), "s": np.array(s, np.float32),
        "y": np.array([0, 3, data.num_classes], np.int32),
    }  # fmt: skip
    kind = np.float32 if config.process.name == "interpolant" else np.int32
    times = {name: example[name].astype(kind) for name in ("t", "s")}
    ours, _ = total_loss(
        params, params, {k: jnp.asarray(v) for k, v in (example | times).items()}, {"sra": aligned.weight},
        networks=networks, process=config_lib.process_of(config), methods=config_lib.methods_of(config),
    )  # fmt: skip
    theirs = peer.loss({k: v.transpose(0, 3, 1, 2).copy() if v.ndim == 4 else v for k, v in example.items()}, teacher)
    assert float(theirs) == pytest.approx(float(ours), rel=1e-5)


@pytest.mark.parametrize("recipe", ["sit_b2", "dit_b2"])
def test_benchmark_beside_the_peer(recipe):
    flags = (f"--config=configs/{recipe}.py:smoke", "--peer=pytorch", "--repeats=1")
    done = run("tools/benchmark.py", "train_step", *flags)
    result = json.loads(done.stdout)
    assert result["speedup_vs_peer"] == pytest.approx(result["peer_step_seconds"] / result["step_seconds"])
    if compiler_there():
        compiled = result["compiled_peer_step_seconds"]
        assert result["speedup_vs_compiled_peer"] == pytest.approx(compiled / result["step_seconds"])
    assert result["speedup_vs_truncated_peer"] == pytest.approx(
        result["peer_truncated_step_seconds"] / result["step_seconds"]
    )
    assert result["memory_over_peer"] == pytest.approx(
        result["peak_memory_bytes"] / result["peer_peak_memory_bytes"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train_step", "--config=configs/sit_b2.py:smoke", "--config.process.path=cosine"), "linear path"),
        (("train_step", "--config=configs/sit_b2.py:smoke", "--config.alignment.distance=cosine"), "smooth_l1"),
        (("sampler", "--config=configs/dit_b2.py:smoke"), "samples SiT only"),
    ],
)
def test_what_the_peer_cannot_do_is_refused(arguments, message):
    done = run("tools/benchmark.py", *arguments, "--peer=pytorch", code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_other_work_beside_pytorch():
    """Every task runs on both sides, at sizes that take seconds."""
    done = run(
        "tools/benchmark.py", "beside", "--repeats=1", "--images=1", "--image_size=64", "--features=64", "--small_vae"
    )  # fmt: skip
    rows = done.stdout.strip().splitlines()
    assert "cores of" in rows[0] and len(rows) == 2 + len(tasks.PEERS)
    assert all(re.fullmatch(r"\| .+ \| \d+\.\d\d s \| \d+\.\d\d s \| \d+\.\d\d \|", row) for row in rows[2:])
