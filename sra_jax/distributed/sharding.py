"""The mesh, and where every array lies on it. No other module knows of devices.

Axes: `data` splits the batch; `fsdp` splits the batch and the state (parameters, EMA and optimizer alike), each block
being gathered when it is its turn; `model` splits attention heads and the hidden layer of the MLP (tensor parallelism).
"""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sra_jax.errors import UserError
from sra_jax.models import attention, blas, operations
from sra_jax.models.flops import Shape
from sra_jax.models.stack import Placement

BATCH = P(("data", "fsdp"))
GATHERED = "fsdp"

REPEATING = ("--xla_gpu_exclude_nondeterministic_ops", "--xla_gpu_deterministic_ops")
"""Flags of XLA with which GPUs compute the same bits in every run."""

BLOCKS = r"(blocks|last_block)(/text|/image)?"
"""Stacks of blocks, of one stream or of two."""

RULES: tuple[tuple[str, P], ...] = (
    # stacked blocks: the first axis is depth and stays whole, for the scan takes one block at a time
    (rf"{BLOCKS}/attention/qkv/kernel", P(None, "fsdp", None, "model", None)),  # (depth, D, 3, heads, D/heads)
    (rf"{BLOCKS}/attention/out/kernel", P(None, "model", None, "fsdp")),  # (depth, heads, D/heads, D)
    (rf"{BLOCKS}/mlp/hidden/kernel", P(None, "fsdp", "model")),  # (depth, D, 4D)
    (rf"{BLOCKS}/mlp/out/kernel", P(None, "model", "fsdp")),  # (depth, 4D, D)
    (rf"{BLOCKS}/modulation/kernel", P(None, None, "fsdp")),  # (depth, D, 6D), never gathered: see `placement`
    (r"(patch_embedding|context_embedding|(time|pooled)_embedding/\w+)/kernel", P(None, "fsdp")),
    (r"label_embedding/embedding", P(None, "fsdp")),
    (r"final/\w+/kernel", P("fsdp", None)),
    # the heads of methods (names that end in head, and a number where there are several)
    (r"head/hidden/kernel", P("fsdp", None)),
    (r"head/out/kernel", P(None, "fsdp")),
    (r"head(_\d+)?/layers/\d+/kernel", P("fsdp", None)),
    (r"head(_\d+)?/convolution/kernel", P(None, None, "fsdp", None)),
    (r"^modulation$", P("data", "fsdp")),  # (B, 6D), as it is made
    (r"bias", P()),  # small: whole on every device
)
"""The first pattern that is found in a parameter's path gives its layout."""


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes; `shape` gives the size of each axis, as `config.mesh_shape` does.

    Where the devices are TPU slices that a network links, `data` is the axis that goes across them: only the sums of
    gradients do.

    Raises:
      UserError: the axis `data` cannot be divided among the slices.
    """
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    slices = slice_count(devices)
    if slices == 1:
        return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=kinds, devices=devices)
    if shape["data"] % slices:
        raise UserError(
            f"mesh.data={shape['data']} cannot be divided among {slices} slices: make it a multiple of {slices}, and "
            "mesh.fsdp and mesh.model no larger than a slice"
        )
    within = {axis: size // slices if axis == "data" else size for axis, size in shape.items()}
    across = {axis: slices if axis == "data" else 1 for axis in shape}
    grid = mesh_utils.create_hybrid_device_mesh(tuple(within.values()), tuple(across.values()), devices)
    return Mesh(grid, tuple(shape), axis_types=kinds)


def slice_count(devices: Sequence[jax.Device] | None = None) -> int:
    """Slices that the devices lie on; only those of TPUs say so, and there is one of anything else."""
    return len({getattr(device, "slice_index", 0) for device in devices or jax.devices()})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def layout(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The layout of one array of the state.

    Args:
      path: its keys joined by "/"; the optimizer's moments carry the paths of their parameters.
      shape: an axis that the mesh axis does not divide stays whole.

    Raises:
      ValueError: no rule speaks of an array of this path with more than one entry.
    """
    if np.prod(shape) <= 1:
        return P()
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape)))  # noqa: B905
    raise ValueError(f"no rule in sra_jax.distributed.sharding.RULES for {path} {shape}")


def platform(device: jax.Device) -> str:
    """A kind of devices as `attention` tells them apart."""
    if device.platform not in ("gpu", "cuda", "rocm"):
        return device.platform
    if "rocm" in f"{device.platform} {device.client.platform_version}".lower():
        return attention.ROCM
    return attention.CUDA if float(device.compute_capability) >= 8 else attention.CUDA_OLD


def implementation_on(mesh: Mesh, name: str, shape: Shape) -> str:
    """The name of the implementation that `attention_on` takes; arguments and errors as there."""
    kind = platform(mesh.devices.flat[0])
    return attention.chosen(name, attention.Case(kind, shape.dtype, shape.width // shape.heads, shape.attended))


def attention_on(mesh: Mesh, name: str, shape: Shape) -> attention.Attend:
    """The attention of a network on a mesh.

    Args:
      mesh: the devices.
      name: an implementation, or "auto" for the one that suits the devices and the network.
      shape: the network's.

    Raises:
      UserError: it cannot run there.
    """
    implementation = attention.IMPLEMENTATIONS[implementation_on(mesh, name, shape)]
    return implementation.attend if implementation.splits else split_attention(implementation.attend, mesh)


def is_gpu(device: jax.Device | None = None) -> bool:
    """Whether a device, by default JAX's first, is a GPU of any maker."""
    return platform(device or jax.devices()[0]) in (attention.CUDA, attention.CUDA_OLD, attention.ROCM)


def gains_by_unrolling(mesh: Mesh, name: str) -> bool:
    """Whether a training step is quicker with a network's blocks one after the other than with a loop over them.

    So it is on GPUs that hold the whole state. A state that is split is made whole a block at a time, which only the
    loop makes sure of.

    Args:
      mesh: the devices.
      name: how the network attends, an implementation's.
    """
    # Where GPUs are to repeat every bit, JAX 0.11's compiler loses all but one of the equal cuDNN calls of such a step,
    # which then ends as an IndexError when it is run.
    lost = name == "cudnn" and must_repeat(os.environ.get("XLA_FLAGS", ""))
    return holds_whole_state(mesh) and is_gpu(mesh.devices.flat[0]) and not lost


def must_repeat(flags: str) -> bool:
    """Whether XLA_FLAGS ask for programs that compute the same bits every time, which a GPU's do not by themselves."""
    last = dict(flag.partition("=")[::2] for flag in flags.split())
    return any(last.get(name, "false").lower() in ("", "1", "true") for name in REPEATING)


def holds_whole_state(mesh: Mesh) -> bool:
    """Whether each device of the mesh has all parameters."""
    return mesh.shape["fsdp"] == mesh.shape["model"] == 1


def split_attention(attend: attention.Attend, mesh: Mesh) -> attention.Attend:
    """Attention that each device computes of its own examples and heads, as the compiler cannot split a kernel."""
    if mesh.size == 1:
        return attend
    batch = BATCH[0]
    of_qkv, of_output = P(batch, None, None, "model", None), P(batch, None, "model", None)

    def split(qkv: jax.Array, precision: Any, segments: jax.Array | None = None) -> jax.Array:
        given = (qkv,) if segments is None else (qkv, segments)
        return jax.shard_map(
            lambda qkv, *segments: attend(qkv, precision, *segments), mesh=mesh, out_specs=of_output,
            in_specs=(of_qkv, P(batch, None))[: len(given)],
            check_vma=False,  # kernels do not say how their results vary over devices
        )(*given)  # fmt: skip

    return split


PRODUCTS = (attention.AUTO, "xla", "blas")


def product_on(mesh: Mesh, name: str) -> Callable[..., jax.Array]:
    """What multiplies activations by parameters on a mesh, as `jax.lax.dot_general` does.

    Args:
      mesh: the devices.
      name: of `PRODUCTS`: by XLA, by SciPy's BLAS where it can be, or by what is quicker there.

    Raises:
      UserError: "blas", and it cannot be called there.
    """
    multiply = multiply_on(mesh, name)
    if multiply is not operations.matrices:
        return functools.partial(operations.product, multiply=multiply)
    # A gain on CPUs, where parameters are whole; TPUs would have to lay kernels out anew.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return operations.product if on_cpu and holds_whole_state(mesh) else jax.lax.dot_general


def multiply_on(mesh: Mesh, name: str = attention.AUTO) -> operations.Multiply:
    """What multiplies matrices on a mesh; arguments and errors as `product_on`."""
    if name == "blas" and (refusal := _blas_refusal(mesh)):
        raise UserError(f"model.products=blas: {refusal}; use auto or xla")
    by_blas = name == "blas" or (name == attention.AUTO and not _blas_refusal(mesh) and blas.gains())
    return blas.multiply if by_blas else operations.matrices


def _blas_refusal(mesh: Mesh) -> str | None:
    if mesh.devices.flat[0].platform != "cpu":
        return f"it multiplies on CPUs, and these are {mesh.devices.flat[0].platform} devices"
    if mesh.size > 1:
        return f"it multiplies on one device, and there are {mesh.size}"
    return blas.refusal()


def placement(
    mesh: Mesh, dtype: Any, attend: attention.Attend = operations.attend, products: str = attention.AUTO
) -> Placement:
    """Where arrays lie while a network runs on the mesh, stated so that the compiler has no choice.

    Activations stay split by examples. Parameters are made whole along `fsdp` one block at a time, in the type in which
    they are used; their gradients go back split. The blocks' modulation works the other way round, for it multiplies
    one row an example where the rest multiplies N: each device makes its columns of the modulation for all examples of
    its `fsdp` group, which then travel to the examples' devices. They are far smaller than the kernel, a third of a
    block's parameters, and its gradient.

    Args:
      mesh: the devices.
      dtype: type of the matrix products; parameters of blocks are cast to it before they travel.
      attend: the implementation of attention.
      products: what multiplies, as `product_on` takes it.

    Raises:
      UserError: as `product_on`.
    """
    product = product_on(mesh, products)
    if mesh.size == 1:
        return Placement(product=product, attend=attend)

    def rows(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))

    def shared(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))

    def modulation(x: jax.Array) -> jax.Array:
        return rows(jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout("modulation", x.shape, mesh))))

    def block(params: Any) -> Any:
        def gather(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            name = path_name(path)
            spec = layout(f"blocks/{name}", (1, *x.shape), mesh)
            if name.endswith("modulation/kernel"):
                return jax.lax.with_sharding_constraint(x.astype(dtype), NamedSharding(mesh, P(*spec[1:])))
            return _gather(x.astype(dtype), P(*spec[1:]), mesh)

        return jax.tree_util.tree_map_with_path(gather, params)

    def others(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: _gather(x, layout(path_name(path), x.shape, mesh), mesh), params
        )

    if mesh.shape[GATHERED] == 1:
        return Placement(rows=rows, product=product, attend=attend)
    return Placement(
        rows=rows, shared=shared, modulation=modulation, block=block, others=others, product=product, attend=attend
    )


def _gather(x: jax.Array, split: P, mesh: Mesh) -> jax.Array:
    """x whole along `fsdp`; its cotangent is split again, which makes the sum over devices a reduce-scatter."""
    whole = NamedSharding(mesh, P(*(None if axis == GATHERED else axis for axis in split)))

    def made_whole(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, whole)

    def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.with_sharding_constraint(cotangent, NamedSharding(mesh, split)),)

    gather = jax.custom_vjp(made_whole)
    gather.defvjp(lambda x: (made_whole(x), None), backward)  # not gather(x), whose result remat policies would keep
    return gather(x)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A tree like `abstract_state` with the sharding of every array."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, layout(path_name(path), leaf.shape, mesh)), abstract_state
    )


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of the global batch that lie on this process's devices, in the order in which they are put there."""
    sharding = batch_sharding(mesh)
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    starts = sorted({(s.start or 0, s.stop or batch_size) for index in slices if index for s in index[:1]})
    return [row for start, stop in starts for row in range(start, stop)]


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def put_rows(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A global batch, a tree of arrays that every process holds whole -> global arrays split over the mesh."""
    split = batch_sharding(mesh)
    return jax.tree.map(
        lambda array: jax.make_array_from_callback(array.shape, split, array.__getitem__), dict(batch)
    )


def gather(array: jax.Array) -> np.ndarray:
    """A global array as NumPy, whole, on every process."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
