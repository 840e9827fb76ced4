"""Products by SciPy's BLAS inside compiled programs: equal to others, called where they are asked for, and no obstacle
to the end of a process."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.models import blas, operations
from sra_jax.planning.compiled import Program

ROOT = Path(__file__).resolve().parents[2]
HIGHEST = jax.lax.Precision.HIGHEST

pytestmark = pytest.mark.skipif(blas.refusal() is not None, reason=f"{blas.refusal()}")


@pytest.fixture
def every_size(monkeypatch):
    """Products of any size, where otherwise small ones are left to the compiler."""
    monkeypatch.setattr(blas, "SMALLEST", 0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def is_called(function, *inputs):
    return blas.TARGET in jax.jit(function).lower(*inputs).as_text()


@pytest.mark.parametrize("axes", [(1, 0), (1, 1), (0, 0)])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(129, 70, 33), (33, 70, 129), (5, 300, 7), (1, 4, 3), (3, 1, 1), (256, 64, 256)]
)
def test_products_are_those_of_numpy(every_size, axes, rows, inner, columns):
    a = normal(1, *((rows, inner) if axes[0] == 1 else (inner, rows)))
    b = normal(2, *((columns, inner) if axes[1] == 1 else (inner, columns)))
    multiply = functools.partial(blas.multiply, axes=axes)
    assert is_called(multiply, a, b)
    expected = np.tensordot(a.astype(np.float64), b.astype(np.float64), axes)
    np.testing.assert_allclose(jax.jit(multiply)(a, b), expected, atol=1e-5 * inner**0.5)


def test_gradients_within_a_loop_that_computes_blocks_again(every_size):
    """Where training uses it: inside `lax.scan`, under `jax.checkpoint`, two independent products at a time."""
    x, kernels = normal(3, 6, 40, 32), normal(4, 3, 32, 32) / 6

    def loss(x, kernels, multiply):
        @jax.checkpoint
        def block(x, kernel):
            made = operations.product(x, kernel, (((2,), (0,)), ((), ())), HIGHEST, multiply=multiply)
            return jnp.sin(made), made.mean()

        x, means = jax.lax.scan(block, x, kernels)
        return jnp.square(x).sum() + means.sum()

    by_blas, by_compiler = (
        jax.value_and_grad(functools.partial(loss, multiply=one), (0, 1))
        for one in (blas.multiply, operations.matrices)
    )
    assert is_called(by_blas, x, kernels) and not is_called(by_compiler, x, kernels)
    for found, expected in zip(
        jax.tree.leaves(jax.jit(by_blas)(x, kernels)), jax.tree.leaves(jax.jit(by_compiler)(x, kernels)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_same_bits_every_time(every_size):
    a, b = normal(5, 500, 300), normal(6, 300, 400)

    @jax.jit
    def several(a, b):
        return [blas.multiply(a * scale, b, (1, 0)) for scale in (1.0, 2.0, 3.0, 4.0)]

    first = several(a, b)
    for _ in range(20):
        for found, expected in zip(several(a, b), first, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_small_and_narrow_products_are_left_to_the_compiler():
    def shape(rows, columns, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, columns), dtype)

    multiply = functools.partial(blas.multiply, axes=(1, 0))
    assert is_called(multiply, shape(1000, 1000), shape(1000, 1000))
    assert not is_called(multiply, shape(999, 1000), shape(1000, 1000))
    assert not is_called(multiply, shape(2000, 1000, jnp.bfloat16), shape(1000, 1000, jnp.bfloat16))
    assert not is_called(multiply, shape(2000, 1000), shape(1000, 1000, jnp.bfloat16))


@pytest.mark.parametrize(
    ("axes", "a", "b"), [((1, 0), (4, 5), (5, 6)), ((1, 1), (4, 5), (6, 5)), ((0, 0), (5, 4), (5, 6))]
)
def test_operations_are_counted(every_size, axes, a, b):
    compiled = jax.jit(functools.partial(blas.multiply, axes=axes)).lower(normal(0, *a), normal(0, *b)).compile()
    assert Program(compiled.as_text()).cost().flops == 2 * 4 * 5 * 6


@pytest.mark.parametrize(
    ("flags", "cores", "expected"),
    [(["sse2", "avx2"], 2, True), (["avx2", "avx512f"], 2, False), (["avx2"], 64, False), ([], 2, False)],
)
def test_which_processors_it_suits(flags, cores, expected):
    assert blas.suits(flags, cores) == expected


def mesh_of(count):
    shape = {"data": count, "fsdp": 1, "model": 1}
    return sharding.make_mesh(shape, jax.devices()[:count])


def test_it_multiplies_where_one_device_has_everything():
    product = sharding.product_on(mesh_of(1), "blas")
    assert product.keywords == {"multiply": blas.multiply}
    assert (sharding.product_on(mesh_of(1), "auto") == operations.product) != blas.gains()
    assert sharding.product_on(mesh_of(1), "xla") is operations.product
    assert sharding.product_on(mesh_of(2), "auto") is operations.product
    with pytest.raises(UserError, match=r"products=blas: it multiplies on one device, and there are 2; use auto"):
        sharding.product_on(mesh_of(2), "blas")


LOOP = """
import sys
import jax, jax.numpy as jnp
from sra_jax.models import blas

def loop(x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(blas.multiply(x, x, (1, 0)) * 1e-3), None), x, None, length=10)[0]

compiled = jax.jit(loop).lower(jnp.ones((1200, 1200))).compile()
compiled(jnp.ones((1200, 1200)))
print("computing", flush=True)
if sys.argv[1] == "raise":
    raise ValueError("wrong")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("end", "code"), [("0", 0), ("3", 3), ("raise", 1)])
def test_a_process_ends_while_it_computes(tmp_path, end, code):
    done = subprocess.run(
        [sys.executable, "-c", LOOP, end], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "computing\n")
    assert ("ValueError: wrong" in done.stderr) == (end == "raise")


SQUARE = """
import jax, jax.numpy as jnp
from sra_jax.models import blas

def square(x):
    return blas.multiply(x, x, (1, 0))

x = jnp.sin(jnp.arange(1200.0 * 1200)).reshape(1200, 1200)
print(float(jnp.abs(jax.jit(square)(x)).sum()))
"""


def test_compiled_programs_of_another_process_call_it(tmp_path):
    """What JAX's cache of compiled programs holds names the call, and a process that finds it there can make it."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    results = [
        subprocess.run(
            [sys.executable, "-c", SQUARE], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert any("square" in entry.name for entry in tmp_path.iterdir())
    assert results[0] == results[1]
    assert float(results[0]) > 1000
