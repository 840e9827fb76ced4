"""Attention over tokens: one operation, its implementations, and which of them a machine and a shape call for.

Each computes softmax(q k^T / sqrt(d)) v for every head, as `operations.attend` says it, and equals it to rounding. The
plain one writes the scores of all pairs of tokens, (B,H,N,N) float32; the fused ones never do (FlashAttention, Dao et
al., arXiv 2205.14135): they keep their output and one number a query for the backward pass, and make the scores again.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sra_jax.errors import UserError
from sra_jax.models import operations

Attend = Callable[..., jax.Array]
"""`attend(qkv, precision, segments=None)`, as `operations.attend`; segments are at least 0."""

Projected = jax.Array | tuple[jax.Array, ...]
"""Queries, keys and values: (B,N,3,H,d), or three arrays (B,N,H,d) for an implementation that takes them apart."""

AUTO = "auto"
CUDA, CUDA_OLD, ROCM, TPU, CPU = "cuda", "cuda before Ampere", "rocm", "tpu", "cpu"
"""Kinds of devices, as far as implementations differ by them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What an implementation is asked for.

    Attributes:
      platform: one of the kinds of devices; None: not known yet.
      dtype: of queries, keys and values.
      head_size: d, channels of a head.
      tokens: N, tokens of one attention.
    """

    platform: str | None
    dtype: Any
    head_size: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
      attend: the operation.
      refusal: why it cannot run a case, to follow its name; None where it can, or where the platform is not known.
      fewest: tokens from which "auto" takes it.
      splits: whether the compiler can split it over devices; else each device calls it on its own examples and heads.
      apart: whether it wants queries, keys and values as three arrays; it takes one as well.
    """

    attend: Attend
    refusal: Callable[[Case], str | None]
    fewest: int = 0
    splits: bool = True
    apart: bool = False


def chosen(name: str, case: Case) -> str:
    """The implementation that `model.attention` means: itself, or for "auto" the first that can run.

    Raises:
      UserError: it cannot run the case; or there is no such implementation.
    """
    if name == AUTO:
        suited = (key for key, one in IMPLEMENTATIONS.items() if case.tokens >= one.fewest and not one.refusal(case))
        return next(suited)
    if name not in IMPLEMENTATIONS:
        raise UserError(f"model.attention={name!r} is unknown; allowed: {', '.join((AUTO, *IMPLEMENTATIONS))}")
    if reason := IMPLEMENTATIONS[name].refusal(case):
        raise UserError(f"model.attention={name} {reason}; use {AUTO}, which takes the best that can run, or plain")
    return name


def cudnn(qkv: Projected, precision: Any, segments: jax.Array | None = None) -> jax.Array:
    """cuDNN's kernel, on NVIDIA GPUs; as `operations.attend`, or of queries, keys and values apart."""
    del precision  # the products' results are float32
    mask = None
    if segments is not None:
        qkv, numbers = _padded(qkv, segments, 2)  # it takes masks of even lengths
        mask = numbers[:, None, :, None] == numbers[:, None, None, :]
    q, k, v = qkv if isinstance(qkv, tuple) else jnp.moveaxis(qkv, 2, 0)
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return mixed if segments is None else mixed[:, : segments.shape[1]]


def flash(
    qkv: jax.Array, precision: Any, segments: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """The kernel of flash.py, on TPUs; arguments and result as there."""
    from sra_jax.models import flash as kernel  # Pallas takes a second to load, which is spent where it is used

    return kernel.attend(qkv, precision, segments, interpret)


def splash(
    qkv: jax.Array, precision: Any, segments: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """JAX's splash kernel, on TPUs, which works through any number of keys in blocks; as `operations.attend`.

    The backward pass gets queries, keys and values as they came in, the output and a number a query: what the kernel
    makes of its inputs is made again.

    Args:
      qkv, segments: as there.
      precision: not the kernel's to choose; it multiplies as the platform does.
      interpret: run the kernel operation by operation, on any platform, slowly.
    """
    del precision

    def run(qkv: jax.Array, segments: jax.Array | None) -> jax.Array:
        return _splash(qkv, segments, interpret)

    kept = jax.checkpoint_policies.save_only_these_names(operations.ATTENTION)
    return jax.checkpoint(run, policy=kept, prevent_cse=False)(qkv, segments)


def _splash(qkv: jax.Array, segments: jax.Array | None, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    tokens, heads, size = qkv.shape[1], *qkv.shape[3:]
    numbers = segments
    if segments is not None or tokens % SPLASH_ROW:
        qkv, numbers = _padded(qkv, segments, SPLASH_ROW)
    q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # (B,H,N,d) each
    q = (q.astype(jnp.float32) * size**-0.5).astype(q.dtype)
    count = q.shape[2]
    block = max(n for n in range(SPLASH_ROW, min(count, SPLASH_BLOCK) + 1, SPLASH_ROW) if count % n == 0)
    blocks = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([kernels.FullMask((count, count))] * heads), head_shards=1, q_seq_shards=1,
        block_sizes=blocks, residual_checkpoint_name=operations.ATTENTION, interpret=interpret,
    )  # fmt: skip
    if numbers is None:
        mixed = jax.vmap(kernel)(q, k, v)
    else:
        mixed = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(numbers, numbers))
    return jnp.moveaxis(mixed, 1, 2)[:, :tokens]


SPLASH_ROW, SPLASH_BLOCK = 128, 512
"""Of whole rows of tokens, blocks of at most so many."""


def _padded(qkv: Any, segments: jax.Array | None, multiple: int) -> tuple[Any, jax.Array]:
    """Tokens of a segment of their own at the end, up to a multiple of tokens; and all segments."""
    batch, tokens = jax.tree.leaves(qkv)[0].shape[:2]
    missing = -tokens % multiple
    if segments is None:
        segments = jnp.zeros((batch, tokens), jnp.int32)
    qkv = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))), qkv)
    return qkv, jnp.pad(segments, ((0, 0), (0, missing)), constant_values=-1)


def _name(dtype: Any) -> str:
    return jnp.dtype(dtype).name


def _cudnn_refusal(case: Case) -> str | None:
    if case.platform not in (None, CUDA):
        return f"runs on NVIDIA GPUs of the Ampere generation or newer, and this is {case.platform}"
    if _name(case.dtype) not in ("bfloat16", "float16"):
        return f"computes in 16 bits, and dtype={_name(case.dtype)}"
    if case.head_size % 8 or case.head_size > 128:
        return f"takes heads of 8 to 128 channels in eights, and these have {case.head_size}"
    return None


def _tpu_refusal(case: Case) -> str | None:
    if case.platform not in (None, TPU):
        return f"runs on TPUs, and this is {case.platform}"
    if case.head_size > 256:
        return f"takes heads of at most 256 channels, and these have {case.head_size}"
    return None


def _flash_refusal(case: Case) -> str | None:
    if case.tokens > FLASH_TOKENS:
        return f"takes at most {FLASH_TOKENS} tokens, and there are {case.tokens}"
    return _tpu_refusal(case)


def _splash_refusal(case: Case) -> str | None:
    if _name(case.dtype) != "bfloat16":
        return f"computes in bfloat16, and dtype={_name(case.dtype)}"
    return _tpu_refusal(case)


FLASH_TOKENS = 2048
"""Of so many tokens a head's keys, and some queries' scores, lie in the fast memory of a TPU."""

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "cudnn": Implementation(cudnn, _cudnn_refusal, apart=True),
    "flash": Implementation(flash, _flash_refusal, fewest=128, splits=False),
    "splash": Implementation(splash, _splash_refusal, fewest=128, splits=False),
    "plain": Implementation(operations.attend, lambda case: None),
}
"""By their names, from the best to the one that always runs; docs/pods.md has what the compiler says of them."""

NAMES = (AUTO, *IMPLEMENTATIONS)
