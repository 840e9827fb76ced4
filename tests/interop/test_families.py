"""What a file is said to be, from the names and shapes of its tensors."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common, t2i_coco
from sra_jax import config as config_lib
from sra_jax.errors import UserError
from sra_jax.interop.families import arguments_to_config, describe, from_original_sit, to_original_sit
from sra_jax.interop.pytorch import expected_shapes, params_from_pytorch, pytorch_from_params
from sra_jax.models.transformer import Transformer, TransformerConfig
from tests.interop.random_tensors import TINY, mmdit_shapes, random_tensors, shapes


@dataclasses.dataclass
class Header:
    """A file of which only the header exists: enough to say what it is, whatever its size."""

    shapes: dict
    path: Path = Path("weights.pt")
    arguments: dict = dataclasses.field(default_factory=dict)
    groups = ("params",)
    step = moment_step = 0


def header(outputs=4, head=True, path="weights.pt", arguments=None, **size):
    return Header(shapes(outputs=outputs, head=head, **(TINY | size)), Path(path), arguments or {})


@pytest.mark.parametrize("image_size", [256, 512])
@pytest.mark.parametrize("size", common.SIZES)
@pytest.mark.parametrize(
    ("family", "outputs", "head", "asked"),
    [("sit", 4, True, "auto"), ("sit", 4, False, "auto"), ("dit", 8, True, "auto"), ("dit", 8, False, "dit"),
     ("sit_original", 8, False, "sit_original")],
)  # fmt: skip
def test_every_family_and_size(family, outputs, head, asked, size, image_size):
    facts = common.SIZES[size]
    given = header(outputs, head, input_size=image_size // 8, classes=1000, depth=facts["depth"], width=facts["width"])
    contents = describe(given, asked, None, common.SIZES)
    assert (contents.family, contents.head, contents.dropped) == (family, head, ())
    assert contents.network == TransformerConfig(
        input_size=image_size // 8, channels=4, output_channels=outputs, num_classes=1000, patch=2, **facts
    )


@pytest.mark.parametrize(("patch", "input_size"), [(2, 8), (4, 16), (8, 32)])
def test_patch_and_resolution_come_from_the_tensors(patch, input_size):
    network = describe(header(patch=patch, input_size=input_size), "auto", 4, common.SIZES).network
    assert (network.patch, network.input_size) == (patch, input_size)


def test_what_else_tells_dit_from_the_original_sit():
    def family(**given):
        return describe(header(8, head=False, **given), "auto", 4, common.SIZES).family

    assert family(path="DiT-XL-2-256x256.pt") == "dit"
    assert family(path="SiT-XL-2-256x256.pt") == "sit_original"
    assert family(path="SiT-XL-2-256x256.pt", arguments={"model": "DiT-XL/2"}) == "dit"
    with pytest.raises(UserError, match=r"very same tensors.*--family=dit or --family=sit_original"):
        family()


@pytest.mark.faults
@pytest.mark.parametrize("outputs", [4, 8])
@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_the_original_sit_is_known_by_its_arguments(outputs, path):
    """Whatever the number of channels: its own training checkpoints with learn_sigma=False look like SRA's SiT."""
    arguments = {"path_type": path, "prediction": "velocity", "loss_weight": None, "num_classes": 10}
    given = header(outputs, head=False, arguments=arguments)
    assert describe(given, "auto", 4, common.SIZES).family == "sit_original"
    with pytest.raises(UserError, match=rf"--family=sit does not fit .*path_type={path} is of the original SiT"):
        describe(header(4, head=False, arguments=arguments), "sit", 4, common.SIZES)
    assert arguments_to_config(arguments)[0]["process.path"] == {"Linear": "linear", "GVP": "cosine"}[path]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_type": "Linear", "prediction": "score"}, "was trained to predict the score"),
        ({"path_type": "GVP", "prediction": "noise"}, "was trained to predict the noise"),
        ({"path_type": "VP", "prediction": "velocity"}, "was trained on the path VP"),
        ({"path_type": "linear", "prediction": "x"}, "was trained to predict the x"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "sit_original"])
def test_what_predicts_something_else_is_refused(arguments, message, asked):
    with pytest.raises(UserError, match=message):
        describe(header(8, head=False, arguments=arguments), asked, 4, common.SIZES)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"loss_type": "l1"}, {"alignment.distance": "l1"}),
        ({"loss_type": "l2"}, {"alignment.distance": "l2"}),
        ({"loss_type": "sml1"}, {}),
        ({"t_max": 200}, {"alignment.interval": (0.0, 0.2)}),
        ({"path_type": "linear", "weighting": "lognormal"},
         {"process.path": "linear", "process.time_distribution": "logit_normal"}),
        ({"path_type": "linear", "weighting": "uniform"}, {"process.path": "linear"}),
        ({"weighting": "lognormal", "t_max": 0.1},
         {"process.time_distribution": "logit_normal", "alignment.interval": (0.0, 0.1)}),
    ],
)  # fmt: skip
def test_settings_that_the_arguments_tell(arguments, expected):
    assert arguments_to_config(arguments) == (expected, [])


def test_a_setting_without_its_like_is_said():
    told, (lost,) = arguments_to_config({"path_type": "cosine", "weighting": "lognormal"})
    assert told == {"process.path": "cosine"}
    assert "weighting=lognormal" in lost


@pytest.mark.faults
@pytest.mark.parametrize(
    ("rows", "arguments", "asked", "classes", "null"),
    [
        (1001, {}, None, 1000, True), (1000, {}, None, 1000, False), (11, {}, None, 10, True),
        (10, {}, None, 10, False), (8, {}, None, 7, True), (1, {}, None, 1, False), (2, {}, None, 1, True),
        (10, {"num_classes": 9}, None, 9, True), (11, {"num_classes": 11}, None, 11, False),
        (10, {"num_classes": 1000}, None, 10, False), (10, {"num_classes": 10}, 9, 9, True), (8, {}, 8, 8, False),
    ],
)  # fmt: skip
def test_whether_the_last_label_is_the_null_label(rows, arguments, asked, classes, null):
    given = header(8, classes=rows - 1, arguments=arguments)
    network = describe(given, "dit", 4, common.SIZES, asked).network
    assert (network.num_classes, network.null_label, network.label_rows) == (classes, null, rows)


def test_classes_that_no_table_of_this_size_has():
    with pytest.raises(UserError, match="11 rows is not that of 9 classes, as asked, but of 10 classes and a null"):
        describe(header(), "auto", 4, common.SIZES, 9)


@pytest.mark.faults
def test_names_of_diffusers_are_called_by_their_name():
    names = ("pos_embed.proj.weight", "transformer_blocks.0.norm1.linear.weight", "proj_out_2.weight")
    with pytest.raises(UserError, match=r"names of a transformer of diffusers .*DiT-XL-2-256x256.pt"):
        describe(Header(dict.fromkeys(names, (4, 4))), "auto", 4, common.SIZES)


def test_projectors_are_dropped():
    given = header(head=False)
    given.shapes["projectors.0.0.weight"] = (2048, 32)
    contents = describe(given, "auto", 4, common.SIZES)
    assert contents.family == "sit"
    assert contents.dropped == ("projectors.0.0.weight",)


def without(name):
    return lambda s: s.pop(name)


@pytest.mark.parametrize(
    ("change", "asked", "heads", "message"),
    [
        (without("blocks.1.attn.qkv.weight"), "auto", 4, r"missing: blocks\.1\.attn\.qkv\.weight$"),
        (without("ap_head.linear2.bias"), "auto", 4, r"missing: ap_head\.linear2\.bias$"),
        (without("pos_embed"), "auto", 4, "no tensor pos_embed"),
        (lambda s: s.update({"blocks.99999999999.mlp.fc1.bias": (32,)}), "auto", 4, "names a block 99999999999"),
        (without("final_layer.linear.weight"), "auto", 4, "no tensor final_layer.linear.weight"),
        (lambda s: s.update({"blocks.0.attn.q_norm.weight": (8,)}), "auto", 4,
         r"unknown: blocks\.0\.attn\.q_norm\.weight"),
        (lambda s: s.update({"blocks.2.mlp.fc2.bias": (33,)}), "auto", 4,
         r"wrong shape: blocks\.2\.mlp\.fc2\.bias \(33,\) instead of \(32,\)"),
        (lambda s: s.update({"final_layer.linear.weight": (24, 32)}), "auto", 4, "6 output channels for 4"),
        (lambda s: s.update({"pos_embed": (1, 15, 32)}), "auto", 4, "15 tokens, not a square"),
        (lambda s: None, "dit", 4, "--family=dit does not fit"),
        (lambda s: None, "auto", None, "give --heads"),
        (lambda s: None, "auto", 5, "--heads=5 does not divide the width 32"),
    ],
)  # fmt: skip
def test_refusals_name_the_tensor(change, asked, heads, message):
    given = header()
    change(given.shapes)
    with pytest.raises(UserError, match=message):
        describe(given, asked, heads, common.SIZES)


def test_a_model_with_two_heads_of_output_is_not_sra_s_sit():
    with pytest.raises(UserError, match="--family=sit does not fit"):
        describe(header(8), "sit", 4, common.SIZES)


@pytest.mark.parametrize("outputs", [4, 8])
@pytest.mark.parametrize("head", [True, False])
def test_names_shapes_and_bits_round_trip(outputs, head):
    tensors = random_tensors(0, outputs=outputs, head=head)
    network = describe(header(outputs, head), "auto" if outputs == 4 else "dit", 4, common.SIZES).network
    assert expected_shapes(network, head) == {name: tensor.shape for name, tensor in tensors.items()}
    again = pytorch_from_params(params_from_pytorch(tensors, network.heads), network.channels, network.input_size)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


@pytest.mark.parametrize("outputs", [4, 8])
def test_original_sit_runs_backwards_in_time(outputs):
    """f(x, t) = -g(x, 1 - t), first C channels: the changed weights against the file's own, in the same network."""
    tensors = random_tensors(1, outputs=outputs, head=False)
    theirs = describe(header(outputs, head=False), "sit_original", 4, common.SIZES).network
    ours = dataclasses.replace(theirs, output_channels=theirs.channels)

    def predict(network, tensors, x, t, y):
        params = jax.tree.map(jnp.asarray, params_from_pytorch(tensors, network.heads)["model"])
        graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(network, rngs=nnx.Rngs(0))))
        return nnx.merge(graph, params)(x, t, y)[0]

    generator = np.random.default_rng(2)
    x = jnp.asarray(generator.standard_normal((5, 8, 8, 4)), jnp.float32)
    t, y = jnp.asarray([0.0, 0.04, 0.3, 0.75, 1.0]), jnp.asarray([0, 3, 9, 10, 1])
    expected = -predict(theirs, tensors, x, 1 - t, y)[..., : theirs.channels]
    changed = {name: from_original_sit(name, tensor, theirs) for name, tensor in tensors.items()}
    actual = predict(ours, changed, x, t, y)
    assert np.abs(np.asarray(expected - predict(theirs, tensors, x, t, y)[..., :4])).max() > 1e-2
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def as_self_flow(tensors, network):
    """Tensors under our time as Self-Flow's checkpoints have them, computed independently of the product: the head's
    name, patches as vectors, and 2C output channels of which the last C are random."""
    generator = np.random.default_rng(7)
    result = {}
    for name, tensor in tensors.items():
        name = name.replace("ap_head.", "projector.")
        if name == "x_embedder.proj.weight":
            tensor = tensor.reshape(len(tensor), -1)
        if name.startswith("final_layer.linear."):
            tensor = tensor.reshape(network.patch**2, network.channels, *tensor.shape[1:])
            unused = generator.normal(size=tensor.shape).astype(np.float32)
            tensor = np.concatenate([-tensor, unused], axis=1).reshape(-1, *tensor.shape[2:])
        result[name] = tensor
    return result


def test_self_flow_s_names_time_and_channels():
    """f(x, t) = -g(x, 1 - t) of a network that was released for the opposite time, and back again."""
    tensors = random_tensors(0)
    network = describe(Header({name: x.shape for name, x in tensors.items()}), "auto", 4, common.SIZES).network
    released = as_self_flow(tensors, network)
    contents = describe(Header({name: x.shape for name, x in released.items()}), "auto", 4, common.SIZES)
    assert (contents.family, contents.method, contents.head) == ("self_flow", "self_flow", True)
    assert contents.in_file("ap_head.linear1.weight") == "projector.linear1.weight"
    assert contents.network == dataclasses.replace(network, output_channels=2 * network.channels)
    ours = {
        name.replace("projector.", "ap_head."): from_original_sit(name, tensor, contents.network)
        for name, tensor in released.items()
    }
    shape = dataclasses.replace(contents.network, output_channels=network.channels)
    x, y = jax.random.normal(jax.random.key(1), (2, 8, 8, 4)), jnp.array([1, 3])

    def predict(tensors, t):
        params = jax.tree.map(jnp.asarray, params_from_pytorch(tensors, 4)["model"])
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(shape, rngs=nnx.Rngs(0))))
        return nnx.merge(graphdef, params)(x, t, y)[0]

    t = jnp.array([0.25, 0.5])
    reversed_net = dict(tensors)
    np.testing.assert_allclose(predict(ours, t), predict(reversed_net, 1 - t), atol=2e-5)
    again = {name: to_original_sit(name, tensor, shape, flat_patches=True) for name, tensor in ours.items()}
    for name, tensor in again.items():
        if not name.startswith("final_layer.linear."):
            np.testing.assert_allclose(tensor, released[name.replace("ap_head.", "projector.")], atol=1e-6)


def test_whose_head_it_is():
    """DTS+AS names its head as SRA does; its arguments, or the user, tell."""
    assert describe(header(), "auto", 4, common.SIZES).method == "sra"
    told = header(arguments={"teacher_t": "sra", "block_out_s": 2, "block_out_t": 3})
    assert describe(told, "auto", 4, common.SIZES).method == "dts_as"
    assert describe(header(), "auto", 4, common.SIZES, method="dts_as").method == "dts_as"
    values, _ = arguments_to_config(told.arguments, "method.dts_as")
    assert values == {"method.dts_as.student_block": 2, "method.dts_as.teacher_block": 3}


@pytest.mark.parametrize("head", [True, False])
def test_repas_text_to_image_at_its_true_size(head):
    """505,070,608 parameters: depth 24, width 768, heads of 32 channels; the shapes need not exist."""
    size = {"input_size": 32, "channels": 4, "patch": 2, "depth": 24, "width": 768, "context": 768}
    contents = describe(Header(mmdit_shapes(head=head, **size)), "auto", None, common.SIZES)
    assert (contents.family, contents.head) == ("mmdit", head)
    recipe = config_lib.transformer_of(t2i_coco.get_config())
    assert contents.network == dataclasses.replace(recipe, dtype=jnp.float32, remat="none")
    leaves = [names for _, names in contents.leaves()]
    assert sorted(name for names in leaves for name in names) == sorted(
        name for name in mmdit_shapes(head=head, **size) if name != "pos_embed"
    )
    trained = sum(math.prod(shape) for name, shape in mmdit_shapes(head=head, **size).items() if name != "pos_embed")
    assert trained == (507_432_208 if head else 505_070_608)
