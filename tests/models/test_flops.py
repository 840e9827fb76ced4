import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sra_jax.methods.heads import Head, head_flops
from sra_jax.models.flops import block_flops, forward_flops, matrix_parameters, train_step_flops
from sra_jax.models.mmdit import MMDiT, MMDiTConfig
from sra_jax.models.transformer import Transformer, TransformerConfig
from sra_jax.planning.compiled import Program

SMALL = TransformerConfig(
    input_size=16, channels=4, output_channels=4, num_classes=10, patch=2, depth=3, width=64, heads=4
)


def compiled_flops(fun, *arguments):
    return Program(jax.jit(fun).lower(*arguments).compile().as_text()).cost().flops


@pytest.mark.parametrize("stop", [None, 2])
def test_forward_pass_against_the_compiled_program(stop):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(SMALL, rngs=nnx.Rngs(0))))
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((2, 16, 16, 4), jnp.float32), ((2,), jnp.float32), ((2,), jnp.int32))
    ]
    taps = () if stop is None else (stop,)

    def forward(params, x, t, y):
        return nnx.merge(graphdef, params)(x, t, y, taps=taps, stop=stop)

    assert compiled_flops(forward, params, *inputs) == pytest.approx(2 * forward_flops(SMALL, stop), rel=1e-6)


JOINT = MMDiTConfig(input_size=16, channels=4, output_channels=4, patch=2, depth=4, width=64, heads=4, context_width=24,
                    context_length=9)  # fmt: skip


@pytest.mark.parametrize(("stop", "pooled"), [(None, False), (None, True), (2, False), (4, False)])
def test_two_streams_against_the_compiled_program(stop, pooled):
    shape = dataclasses.replace(JOINT, pooled=pooled)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: MMDiT(shape, rngs=nnx.Rngs(0))))
    y = {"context": jax.ShapeDtypeStruct((2, 9, 24), jnp.float32), "end": jax.ShapeDtypeStruct((2,), jnp.int32)}
    inputs = [jax.ShapeDtypeStruct((2, 16, 16, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32), y]

    def forward(params, x, t, y):
        return nnx.merge(graphdef, params)(x, t, y, taps=() if stop is None else (stop,), stop=stop)

    assert compiled_flops(forward, params, *inputs) == pytest.approx(2 * forward_flops(shape, stop), rel=1e-6)


def test_text_to_image_is_as_large_as_the_papers():
    """REPA's MMDiT: 505,070,608 parameters; 2 * 24 blocks' products on 333 tokens make 121 GFLOP an image."""
    shape = MMDiTConfig(input_size=32, channels=4, output_channels=4, patch=2, depth=24, width=768, heads=24,
                        context_width=768, context_length=77)  # fmt: skip
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: MMDiT(shape, rngs=nnx.Rngs(0))))[1])
    assert sum(x.size for x in jax.tree.leaves(params)) == 505_070_608
    assert forward_flops(shape) == pytest.approx(120.9e9, rel=2e-3)
    assert matrix_parameters(shape) == pytest.approx(505_070_608, rel=2e-3)


def test_head_against_the_compiled_program():
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Head(SMALL, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)
    found = compiled_flops(lambda p, x: nnx.merge(graphdef, p)(x), params, tokens)
    assert found == pytest.approx(2 * head_flops(SMALL), rel=1e-6)


def test_xl_is_as_large_as_published():
    """DiT-XL/2 at 256x256: 118.6 GFLOPs (Peebles and Xie, 2023, table 4), which count a multiply-add once."""
    xl = TransformerConfig(input_size=32, channels=4, output_channels=4, num_classes=1000, patch=2, depth=28,
                           width=1152, heads=16)  # fmt: skip
    assert forward_flops(xl) / 2 == pytest.approx(118.6e9, rel=2e-3)
    step = train_step_flops(xl, 256, teacher_blocks=20, head=head_flops(xl))
    assert step.teacher / 256 == pytest.approx(20 / 28 * forward_flops(xl), rel=1e-3)
    assert step.student / 256 == pytest.approx(3 * forward_flops(xl), rel=1e-3)
    np.testing.assert_allclose(train_step_flops(xl, 256).total, step.student)
    assert block_flops(xl) * 28 < forward_flops(xl)
