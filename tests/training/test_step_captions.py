"""The train step where the network is told captions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, digits
from sra_jax import config as config_lib
from sra_jax.data import digits_captions, registry
from sra_jax.data.captions import embedded
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.methods.registry import METHODS
from sra_jax.training import program as program_lib
from sra_jax.training.step import draw
from tests.training.test_step import BATCH, losses

ONE_TIME = [name for name in METHODS if name not in ("self_flow", "dts_as", "delta_fm")]


def recipe(**changes):
    """Random latents and captions; the network so small that compiling it is most of the work."""
    config = digits.get_config(changes.pop("variant", None)).unlock()
    config_lib.tell_captions(config)
    config.data.update(name="synthetic", image_size=4, channels=1, context_length=5, context_width=8)
    small = {"model.depth": 3, "model.width": 32, "model.heads": 2, "batch_size": BATCH, "optimizer.warmup_steps": 0,
             "alignment.student_block": 1, "alignment.teacher_block": 3, "model.pooled": True}  # fmt: skip
    config.update_from_flattened_dict(small)
    common.small_methods(config, standardise="target")  # blocks that so few have
    config.update_from_flattened_dict(changes)
    return config.lock()


@functools.cache
def one_device():
    return losses(recipe(), steps=3)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp", "model"), [(2, 2, 2)])
def test_eight_devices_give_the_losses_of_one(data, fsdp, model):
    expected, _ = one_device()
    config = recipe(**{"mesh.data": data, "mesh.fsdp": fsdp, "mesh.model": model})
    actual, state = losses(config, devices=8, steps=3)
    for name in ("loss", "loss_denoising", "loss_alignment", "grad_norm", "teacher_feature_norm"):
        np.testing.assert_allclose([m[name] for m in actual], [m[name] for m in expected], rtol=1e-5, err_msg=name)
    for stack, stream in (("blocks", "text"), ("blocks", "image"), ("last_block", "image")):
        kernel = state.ema["model"][stack][stream]["mlp"]["hidden"]["kernel"]
        assert kernel.addressable_shards[0].data.size * fsdp * model == kernel.size


@pytest.mark.slow
def test_accumulation_changes_nothing():
    expected, whole = one_device()
    actual, parts = losses(recipe(accumulation=4), steps=3)
    for name in expected[0]:
        np.testing.assert_allclose([m[name] for m in actual], [m[name] for m in expected], rtol=2e-4, err_msg=name)
    for a, b in zip(jax.tree.leaves(whole.ema), jax.tree.leaves(parts.ema), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("devices", [1, 8])
def test_ids_are_embedded_on_the_devices(devices):
    """A batch of token ids becomes what a batch of stored embeddings is, shapes and types of the program included."""
    mesh = sharding.make_mesh({"data": devices, "fsdp": 1, "model": 1}, jax.devices()[:devices])
    found = {}
    for form in ("embeddings", "ids"):
        dataset = digits_captions.load(ConfigDict({"captions": form}))
        batch = dataset.source.read_epochs(np.arange(16), np.arange(16))
        assert ("ids" in batch) == (form == "ids")
        found[form] = embedded(dataset.text, mesh, jnp.float32)(sharding.put_batch(batch, mesh))
        expected = program_lib.abstract_batch(dataset, 16, mesh)
        assert {name: (x.shape, x.dtype, x.sharding) for name, x in found[form].items()} == {
            name: (x.shape, x.dtype, x.sharding) for name, x in expected.items()
        }
    for name, array in found["embeddings"].items():
        np.testing.assert_allclose(found["ids"][name], array, atol=1e-5, err_msg=name)


def test_captions_are_dropped_whole():
    """The right share of captions is the empty one, embeddings and end alike; the others stay."""
    config, count = recipe(), 20_000
    text = registry.text_encoder(config.data)
    batch = {"context": jnp.ones((count, 5, 8), jnp.float16), "end": jnp.full(count, 4)}
    example = draw(
        jax.random.key(5), jnp.zeros((count, 1, 1, 1)), batch, config_lib.process_of(config),
        config_lib.methods_of(config), config_lib.transformer_of(config), label_dropout=0.1, null=text.null,
    )  # fmt: skip
    assert example["y"]["context"].dtype == jnp.float32
    dropped = np.asarray(example["y"]["end"]) == text.null["end"]
    assert dropped.mean() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(np.asarray(example["y"]["context"])[dropped], 0)
    np.testing.assert_array_equal(np.asarray(example["y"]["context"])[~dropped], 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ONE_TIME)
def test_methods_with_one_time_an_image(method):
    config = recipe(**{"method.name": method})
    (first, *_), _ = losses(config, steps=1)
    assert all(np.isfinite(value) for value in first.values())
    assert first["loss"] != first["loss_denoising"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.name": "self_flow"}, "self_flow gives tokens of an image times of their own"),
        ({"method.name": "sra+dts_as"}, "dts_as"),
        ({"method.name": "delta_fm"}, "which samplers take back by the means of classes"),
        ({"data.num_classes": 3}, "there are no labels with model.name=mmdit"),
        ({"data.captions": "words"}, "allowed: embeddings, ids"),
        ({"model.initialisation": "magic"}, "allowed: uniform, adaln_zero"),
        ({"model.depth": 1, "alignment.teacher_block": 1}, "model.depth=1 is too few"),
        ({"evaluation.every": 5}, "needs labels"),
        ({"sampling.preview_prompts": ()}, "must be captions"),
        ({"model.name": "transformer"}, "is not read by anything with model.name='transformer'"),
        ({"model.name": "unet"}, "allowed: transformer, mmdit"),
    ],
)
def test_what_captions_do_not_go_with(changes, message):
    with pytest.raises(UserError, match=message):
        config_lib.check(recipe(**changes))


def test_sets_of_the_other_kind_are_refused():
    labels = digits.get_config().unlock()
    labels.data.name = "digits_captions"
    with pytest.raises(UserError, match="has captions, which this recipe"):
        registry.load(labels.data)
    captions = recipe().unlock()
    captions.data.name = "digits"
    with pytest.raises(UserError, match="has labels"):
        registry.load(captions.data)
    ids = recipe(**{"data.captions": "ids"})
    with pytest.raises(UserError, match="'synthetic' has embeddings only"):
        registry.load(ids.data)
    with pytest.raises(UserError, match="'digits' has no captions"):
        registry.text_encoder(captions.data)
