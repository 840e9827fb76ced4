"""Counts read from compiled programs, and what the train step's program must not hold."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import digits
from sra_jax import config as config_lib
from sra_jax.data import registry
from sra_jax.distributed import sharding
from sra_jax.planning.compiled import Program, group_size, groups
from sra_jax.training import program as program_lib
from sra_jax.training.step import SAMPLED_TOKENS


def cost_of(fun, *arguments, **options):
    return Program(jax.jit(fun, **options).lower(*arguments).compile().as_text()).cost()


def test_loops_count_as_often_as_they_run():
    x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)

    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]

    def started_late(x, w):
        return jax.lax.fori_loop(2, 5, lambda i, x: jnp.sin(x @ w[i]), x)

    def unrolled(x, w):
        for i in range(5):
            x = jnp.sin(x @ w[i])
        return x

    one = 2 * 8 * 16 * 16
    assert cost_of(unrolled, x, w).flops == cost_of(scanned, x, w).flops == 5 * one
    assert cost_of(started_late, x, w).flops == 3 * one
    assert cost_of(scanned, x, w).unknown_loops == 0


def test_traffic_of_a_stack_is_what_is_used_of_it():
    """Five steps that read one matrix each: the stack passes once, not five times."""
    x, w = jax.ShapeDtypeStruct((8, 256), jnp.float32), jax.ShapeDtypeStruct((5, 256, 256), jnp.float32)
    cost = cost_of(lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0], x, w)
    stack = 5 * 256 * 256 * 4
    assert stack < cost.memory_bytes < 3.5 * stack  # read, and at most copied once on the way


def test_convolutions():
    x, w = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert cost_of(convolve, x, w).flops == 2 * 2 * 6 * 6 * 5 * 3 * 3 * 3


def test_collectives_of_a_loop():
    """Each of three steps sums a (64,) vector over eight devices: 2 * 7/8 of its bytes leave every device."""
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "model": 1})
    split, whole = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P())

    def summed(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.with_sharding_constraint(jnp.sin(w @ x), whole), x)

    cost = cost_of(summed, jnp.zeros((64,)), jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split))
    assert sum(cost.sent.values()) == pytest.approx(3 * 64 * 4 * (2 * 7 / 8 + 7 / 8), rel=0.5)
    assert cost.sent["all-reduce"] == 3 * 2 * 64 * 4 * 7 / 8


FUSED = """
ENTRY %main (input: bf16[1152,4608]) -> bf16[288,4608] {
  %input = bf16[1152,4608]{1,0} parameter(0)
  ROOT %fusion.1 = bf16[288,4608]{1,0} fusion(%input), kind=kCustom, calls=%all-reduce-scatter.1
}

%all-reduce-scatter.1 (input.1: bf16[1152,4608]) -> bf16[288,4608] {
  %input.1 = bf16[1152,4608]{1,0} parameter(0)
  %all-reduce.1 = bf16[1152,4608]{1,0} all-reduce(%input.1), replica_groups={{0,1,2,3}}, to_apply=%add
  %place = u32[] constant(0)
  ROOT %slice.1 = bf16[288,4608]{1,0} dynamic-slice(%all-reduce.1, %place, %place), dynamic_slice_sizes={288,4608}
}
"""


def test_a_kernel_that_keeps_its_part_of_a_sum_is_a_reduce_scatter():
    """As programs for TPUs write it: half of what an all-reduce sends."""
    assert Program(FUSED).cost().sent == {"reduce-scatter": 1152 * 4608 * 2 * 3 / 4}


KERNELS = """
ENTRY %main (qkv: bf16[2,3,4,64,256], q: bf16[2,4,256,64]) -> bf16[2,4,256,64] {
  %qkv = bf16[2,3,4,64,256]{4,3,2,1,0} parameter(0)
  %q = bf16[2,4,256,64]{3,2,1,0} parameter(1)
  %bitcast.1 = bf16[2,3,4,64,256]{4,3,2,1,0} bitcast(%qkv)
  %bitcast.2 = bf16[2,3,4,64,256]{4,3,2,1,0} bitcast(%qkv)
  %attention_forward.1 = bf16[2,4,64,256]{3,2,1,0} custom-call(%bitcast.1, %bitcast.2), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"1"}}}
  ROOT %splash_mha_dkv.3 = bf16[2,4,256,64]{3,2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


def test_kernels_that_are_no_operation_of_the_compiler():
    """One says its operations, of another they are known by name; what one gets twice it reads once."""
    (of_first, read_by_first), (of_second, read_by_second) = Program(KERNELS).cost().kernels
    assert (of_first, of_second) == (1000, 5 * 2 * 2 * 4 * 256 * 256 * 64)
    share = 2 * 4 * 64 * 256 * 2
    assert (read_by_first, read_by_second) == (4 * share, 2 * share)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", 4),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=16] {'axis_1'}", 16),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=8], device_ids=([8,4]T(1,0)) {'axis_1'}, x", 4),
    ],
)
def test_group_sizes(text, size):
    assert group_size(text) == size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_who_takes_part(text, expected):
    assert groups(text).tolist() == expected


BETWEEN_SLICES = """HloModule step

ENTRY %main (p.1: f32[4,8], p.2: bf16[16]) -> f32[4,8] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  %p.2 = bf16[16]{0} parameter(1)
  %token.1 = token[] after-all()
  %send.1 = (f32[4,8]{1,0}, u32[], token[]) send(%p.1, %token.1), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[4,8]{1,0}, u32[], token[]) recv(%token.1), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.2 = (bf16[16]{0}, u32[], token[]) send(%p.2, %token.1), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}
  %done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  %within.1 = f32[4,8]{1,0} all-reduce(%p.1), replica_groups=[2,4]<=[8], to_apply=%add
  %done.2 = (f32[4,8]{1,0}, token[]) recv-done(%recv.1), channel_id=1, is_host_transfer=true
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%done.2), index=0
}
"""


@pytest.mark.parametrize("slices", [2, 4])
def test_what_crosses_slices(slices):
    """TPU programs write it as sends between hosts; a sum within a slice stays there."""
    cost = Program(BETWEEN_SLICES).cost(slices)
    size = 4 * 8 * 4
    assert cost.crossing == {"all-reduce": 2 * size * (slices - 1) / slices, "all-gather": 32 * (slices - 1)}
    assert cost.sent["all-gather"] == cost.crossing["all-gather"]
    assert cost.sent["all-reduce"] - cost.crossing["all-reduce"] == 2 * size * 3 / 4
    assert cost.memory_bytes == 0


BATCH, WIDTH, DEPTH = 64, 64, 5


@functools.cache
def step_program(devices=8, fsdp=1, remat="none", alignment=True, changes=()):
    config = digits.get_config()
    config.update_from_flattened_dict({
        "model.depth": DEPTH, "model.width": WIDTH, "model.heads": 4, "batch_size": BATCH, "model.remat": remat,
        "mesh.fsdp": fsdp, "alignment.enabled": alignment, "alignment.teacher_block": 3, **dict(changes),
    })  # fmt: skip
    config_lib.check(config, devices)
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, devices), jax.devices()[:devices])
    dataset = registry.load(config.data)
    program = program_lib.build(config, mesh, dataset, steps=100)
    lowered = program.train_step.lower(program.state, program_lib.abstract_batch(dataset, BATCH, mesh))
    analytic = config_lib.step_flops(config)
    return Program(lowered.compile().as_text()), program, analytic


def test_no_large_array_is_whole_on_a_device():
    """Under FSDP no device holds the global batch's tokens, nor a stack of whole weights, at any time."""
    compiled, program, _ = step_program(fsdp=8, remat="block")
    tokens = BATCH * 16 * WIDTH  # of the whole batch
    stack = program.state.params["model"]["blocks"]["mlp"]["out"]["kernel"].size
    one_block = program.state.params["model"]["blocks"]["modulation"]["kernel"].size // DEPTH
    for instruction in compiled.instructions():
        for array in instruction.arrays:
            size = np.prod(array.shape)
            assert size < min(tokens, stack), f"{instruction.name} {instruction.opcode} {array.shape}"
            if instruction.opcode == "all-gather":
                assert size <= one_block, f"{instruction.name} gathers {array.shape}: more than a matrix of a block"


def test_the_gradient_of_the_modulation_stays_where_it_is_made():
    """Its rows travel, a few for each example, in place of its kernel's gradient."""
    compiled, program, _ = step_program(fsdp=8, remat="block")
    kernel = program.state.params["model"]["blocks"]["modulation"]["kernel"].size // DEPTH
    sent = [
        math.prod(array.shape) for instruction in compiled.instructions()
        if instruction.opcode in ("all-reduce", "reduce-scatter") for array in instruction.arrays
    ]  # fmt: skip
    assert kernel not in sent
    assert kernel * 2 // 3 in sent  # as the others' are, such as those of the MLP
    assert compiled.cost().sent["all-to-all"] > 0


def test_without_remat_parameters_are_gathered_again_in_the_backward_pass():
    """They are not kept from the forward pass: a whole network in the type of the products."""
    sent = {remat: step_program(fsdp=8, remat=remat)[0].cost().sent["all-gather"] for remat in ("none", "block")}
    assert sent["none"] == pytest.approx(sent["block"], rel=0.02)


def test_fsdp_sends_each_parameter_as_often_as_it_is_used():
    """Gathered for the student's two passes and for blocks 1..n of the teacher; the rest is the gradient's sum."""
    compiled, program, _ = step_program(fsdp=8, remat="block")
    model = program.state.params["model"]
    blocks = sum(leaf.size * 4 for path, leaf in jax.tree_util.tree_leaves_with_path(model["blocks"])
                 if "kernel" in sharding.path_name(path))  # fmt: skip
    others = sum(leaf.size * 4 for tree in (*(model[k] for k in model if k != "blocks"), program.state.params["head"])
                 for leaf in jax.tree.leaves(tree))  # fmt: skip
    needed = (2 + 3 / DEPTH) * blocks * 7 / 8
    assert needed <= compiled.cost().sent["all-gather"] <= needed + 3 * others


@pytest.mark.slow
def test_data_parallel_traffic_does_not_grow_with_the_devices():
    """Gradients are summed once: 2 (n-1)/n of their bytes, whatever n; and a few tokens go into the log."""
    sent = {n: sum(step_program(devices=n)[0].cost().sent.values()) for n in (2, 8)}
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(step_program(devices=2)[1].state.params))
    logged = 3 * SAMPLED_TOKENS * WIDTH * 4  # of the student, compared, target
    for n, size in sent.items():
        summed = 2 * gradients * (n - 1) / n
        assert 0.95 * summed <= size <= 1.05 * summed + 2 * logged


def test_operations_are_the_analytic_ones():
    """Without remat; the teacher costs n/depth of a forward pass and nothing else."""
    compiled, _, analytic = step_program(devices=1)
    assert 1 <= compiled.cost().flops / analytic.total < 1.10
    baseline, _, plain = step_program(devices=1, alignment=False)
    assert 1 <= baseline.cost().flops / plain.total < 1.10
    extra = compiled.cost().flops - baseline.cost().flops
    assert extra == pytest.approx(analytic.teacher + analytic.head, rel=0.05)


def of_method(name, **keys):
    """The step with SRA's blocks and head, at 64 tokens."""
    blocks = {"student_block": 2, "teacher_block": 3}
    section = {"sra": "alignment"}.get(name, f"method.{name}")
    changes = {"model.patch": 1, "method.name": name}
    changes |= {f"{section}.{key}": value for key, value in (blocks | keys).items()}
    return step_program(devices=1, changes=tuple(changes.items()))[0].cost()


@pytest.mark.slow
def test_two_times_an_example_cost_no_more_than_one():
    """Two modulations an example, selected a token, where one a token would cost half a step more."""
    assert 1 < of_method("self_flow").flops / of_method("sra").flops < 1.01


@pytest.mark.slow
def test_one_group_is_no_groups():
    """Its program is that of a method which knows none."""
    one, none = of_method("dts_as", ratios=(1.0,), distance="smooth_l1"), of_method("sra")
    assert one.flops == none.flops
    assert one.memory_bytes == pytest.approx(none.memory_bytes, rel=0.002)
