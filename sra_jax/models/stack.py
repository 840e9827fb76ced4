"""Running a stack of equal blocks whose parameters carry a leading depth axis.

A loop over them is compiled once whatever the depth. What the backward pass needs of every block it stacks, though,
which GPUs do by copying; there a step is quicker with the blocks one after the other, and takes longer to compile.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sra_jax.models import operations


def _is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether results are those of cuDNN's attention, which gives them no name."""
    return primitive.name.startswith("dot_product_attention_fwd")


def _keeping(*names: str) -> Callable[..., Any]:
    """The policy that keeps products with parameters, what bears one of the names, and cuDNN's attention."""
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.save_only_these_names(*names), _is_fused_attention
        ),
    )


_KEPT = (operations.PRODUCT, operations.ATTENTION, operations.NORM)

REMAT_POLICIES = {
    "none": None,
    "gelu": _keeping(*_KEPT, operations.GELU),
    "dots": _keeping(*_KEPT),
    "block": jax.checkpoint_policies.nothing_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What is saved for the backward pass: everything; as the next, and the MLPs' GELUs; the results of products with
parameters and of attention (not its scores), and two numbers a token for each norm; each block's input only; the input
of about sqrt(depth) segments of blocks only, which costs a third forward pass."""

STACKS = ("blocks", "last_block")
"""Names, in a network's tree of parameters, of what is run by `run_stack`."""

Block = Callable[[Any, Any, Any], Any]


def _as_it_is(x: Any) -> Any:
    return x


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays lie while a network runs; by default wherever the compiler likes.

    Attributes:
      rows: applied to activations, whose leading axis is the batch.
      shared: applied to the condition, of which a device may need more examples than its own.
      modulation: applied to what a block makes of it.
      block: applied to the parameters of one block just before they are used, in the forward and again in the backward
        pass: its result, a copy that is whole on every device, is never kept from the one to the other.
      others: applied to the parameters outside the blocks.
      product: what multiplies activations by the parameters of a block, as `jax.lax.dot_general` does.
      attend: attention over tokens, as `operations.attend` does it.
      apart: whether `attend` takes queries, keys and values as three arrays (B,N,H,d) in place of one (B,N,3,H,d).
      unrolled: whether a stack's blocks are compiled one after the other in place of a loop over them.
    """

    rows: Callable[[jax.Array], jax.Array] = _as_it_is
    shared: Callable[[jax.Array], jax.Array] = _as_it_is
    modulation: Callable[[jax.Array], jax.Array] = _as_it_is
    block: Callable[[Any], Any] = _as_it_is
    others: Callable[[Any], Any] = _as_it_is
    product: Callable[..., jax.Array] = jax.lax.dot_general
    attend: Callable[..., jax.Array] = operations.attend
    apart: bool = False
    unrolled: bool = False


ANYWHERE = Placement()


def run_stack(
    block: Block, params: Any, x: Any, condition: Any, *, depth: int, taps: tuple[int, ...], stop: int,
    remat: str, placement: Placement = ANYWHERE, tapped: Callable[[Any], jax.Array] = _as_it_is,
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Apply blocks 1..stop to the tokens and return the tokens after some of them.

    Args:
      block: `block(params_of_one, x, condition) -> x`, pure.
      params: tree of arrays with a leading axis of `depth`.
      x: tokens (B,N,D), or a tree of such.
      condition: what every block sees, a tree of arrays.
      depth: number of blocks in `params`.
      taps: ascending block numbers in 1..stop.
      stop: number of blocks to run; the parameters of later blocks are not read.
      remat: a key of `REMAT_POLICIES`.
      placement: where tokens and the parameters of a block lie, and whether the blocks are a loop; with `remat="full"`
        they are.
      tapped: which of the tokens a tap gives.

    Returns:
      The tokens after block `stop` and a tuple of the tapped tokens after each tap, (B,N,D) each.
    """

    def placed(params: Any, x: Any, condition: Any) -> Any:
        return jax.tree.map(placement.rows, block(placement.block(params), x, condition))

    if placement.unrolled and remat != "full":
        # CSE would find that what is to be computed again was there, and keep it.
        run = _saving(placed, remat, placement, prevent_cse=True)
        return _run_unrolled(run, params, x, condition, taps, stop, tapped)
    run = _saving(placed, remat, placement)
    if stop < depth:
        return _run_part(run, params, x, condition, taps, stop, tapped)

    # One scan over the whole depth: cutting it at the taps would slice, and so copy, the stacked parameters and their
    # gradients. The tokens at a tap travel in the carry instead.
    def body(carry: tuple[Any, tuple[jax.Array, ...]], item: tuple[jax.Array, Any]) -> tuple[Any, None]:
        x, features = carry
        number, params = item
        x = run(params, x, condition)
        new = tuple(jnp.where(number == tap, tapped(x), old) for tap, old in zip(taps, features, strict=True))
        return (x, new), None

    carry = (x, tuple(jnp.zeros_like(tapped(x)) for _ in taps))
    items = (jnp.arange(1, depth + 1), params)
    if remat == "full":
        (x, features), _ = _scan_in_segments(body, carry, items, depth)
    else:
        (x, features), _ = jax.lax.scan(body, carry, items)
    return x, features


def segment_count(depth: int) -> int:
    """The divisor of depth nearest to its square root: how many block inputs `remat="full"` saves."""
    return min((d for d in range(1, depth + 1) if depth % d == 0), key=lambda d: abs(math.log(d / math.sqrt(depth))))


def _scan_in_segments(body: Callable[..., Any], carry: Any, items: Any, depth: int) -> tuple[Any, None]:
    """`jax.lax.scan(body, carry, items)` of which the backward pass has the carry at the segments' starts only."""
    segments = segment_count(depth)
    items = jax.tree.map(lambda p: p.reshape(segments, depth // segments, *p.shape[1:]), items)
    segment = jax.checkpoint(
        lambda carry, items: jax.lax.scan(body, carry, items), policy=REMAT_POLICIES["full"], prevent_cse=False
    )
    return jax.lax.scan(segment, carry, items)


def _saving(block: Block, remat: str, placement: Placement, prevent_cse: bool = False) -> Block:
    """`block` with what its backward pass keeps. In a loop CSE is no concern: forward and backward are two of them."""
    if remat != "none":
        return jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)
    if placement.block is _as_it_is:
        return block
    return jax.checkpoint(block, policy=_all_but_placed, prevent_cse=prevent_cse)


def _all_but_placed(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves all but the results of placing: gathered parameters are gathered again in the backward pass."""
    return primitive.name != "sharding_constraint"


def _run_unrolled(
    block: Block, params: Any, x: Any, condition: Any, taps: tuple[int, ...], stop: int,
    tapped: Callable[[Any], jax.Array],
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Blocks 1..stop, each in the program."""
    leaves, structure = jax.tree.flatten(params)
    features = []
    for number, parts in enumerate(zip(*map(unstacked, leaves), strict=True), 1):
        if number > stop:
            break
        x = block(jax.tree.unflatten(structure, parts), x, condition)
        if number in taps:
            features.append(tapped(x))
    return x, tuple(features)


@jax.custom_vjp
def unstacked(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """The entries along the first axis.

    The gradients of all entries are written down side by side, before anything is computed of them: a compiler that
    fuses an optimizer with that would let each of its reads look for the array that it is in.
    """
    return tuple(part.reshape(part.shape[1:]) for part in jax.lax.split(stacked, [1] * len(stacked)))


unstacked.defvjp(
    lambda stacked: (unstacked(stacked), None),
    lambda _, gradients: (jax.lax.optimization_barrier(jnp.stack(gradients)),),
)


def _run_part(
    block: Block, params: Any, x: Any, condition: Any, taps: tuple[int, ...], stop: int,
    tapped: Callable[[Any], jax.Array],
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Blocks 1..stop by index into the whole stack: no copy of the part of the parameters that is used."""

    def body(index: jax.Array, x: Any) -> Any:
        one = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), params)
        return block(one, x, condition)

    features = []
    start = 0
    for tap in taps:
        x = jax.lax.fori_loop(start, tap, body, x)
        features.append(tapped(x))
        start = tap
    return jax.lax.fori_loop(start, stop, body, x), tuple(features)
