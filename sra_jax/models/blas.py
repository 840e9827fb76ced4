"""Products of matrices by SciPy's BLAS, as part of programs that JAX compiles for the CPU.

On some processors the kernels that XLA multiplies with stay behind a tuned BLAS. JAX needs SciPy, so one is always
there. A compiled program reaches it through XLA's foreign function interface (`jax.ffi`), whose C structures
(xla/ffi/api/c_api.h in `jax.ffi.include_dir()`) are read with ctypes: no compiler is needed. A product is cut into one
piece a core; each is one call, which holds no lock of Python's. The BLAS uses no threads of its own, which would wait
for their next work in a busy loop while XLA computes.
"""

import atexit
import ctypes
import functools
import os
import platform
import queue
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.models import operations

TARGET = "sra_jax_product"
"""Begins the names under which compiled programs call this; which axes are summed over ends them."""

SMALLEST = 2e9
"""Operations from which on a product is worth the call, a tenth of a millisecond."""

MOST_CORES = 8
"""Cores up to which this is a choice of `gains`: pieces get smaller with more, and each waits for Python once."""

EDGE = 16  # rows or columns that the kernels of a BLAS take at once, or a multiple

Axes = tuple[int, int]
"""The axes of a and b that are summed over."""


def gains() -> bool:
    """Whether large products are quicker this way on this machine, as `suits` says, and possible."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # another system
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return suits(flags.split(), _cores()) and refusal() is None


def suits(flags: Collection[str], cores: int) -> bool:
    """Whether SciPy's BLAS is quicker than XLA on a processor: with AVX2 but no AVX-512, and a few cores.

    Args:
      flags: what Linux says it can, such as "avx2".
      cores: that this process may use.
    """
    return "avx2" in flags and "avx512f" not in flags and cores <= MOST_CORES


def refusal() -> str | None:
    """Why SciPy's BLAS cannot be called on this machine, or None."""
    if platform.system() != "Linux":
        return f"it is called on Linux alone, and this is {platform.system()}"
    try:
        _library()
    except (ImportError, LookupError) as error:
        return str(error)
    return None


def multiply(a: jax.Array, b: jax.Array, axes: Axes, precision: Any = None, dtype: Any = None) -> jax.Array:
    """The product of two matrices, summed over one axis of each; for `operations.product`.

    Args:
      a: (R,I), or (I,R) where axis 0 is summed over.
      b: (I,C), or (C,I) where axis 1 is summed over.
      axes: that are summed over; all but (0, 1).
      precision, dtype: as `jax.lax.dot_general` takes them. What is not float32 throughout, or small, it multiplies.

    Returns:
      (R,C).
    """
    rows, columns, inner = a.shape[1 - axes[0]], b.shape[1 - axes[1]], a.shape[axes[0]]
    narrow = {a.dtype, b.dtype, jnp.dtype(dtype or a.dtype)} != {jnp.dtype(jnp.float32)}
    if narrow or 2 * rows * columns * inner < SMALLEST:
        return operations.matrices(a, b, axes, precision, dtype)
    register()
    result = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    return jax.ffi.ffi_call(_target(axes), result, vmap_method="sequential")(a, b)


@functools.cache
def register() -> None:
    """Let compiled programs of this process call the BLAS; a program from JAX's cache needs it, too.

    Raises:
      LookupError, ImportError: `refusal` says why.
    """
    _library()
    for axes in ((1, 0), (1, 1), (0, 0)):
        call = ctypes.cast(_handler(axes), ctypes.c_void_p)
        jax.ffi.register_ffi_target(_target(axes), jax.ffi.pycapsule(call), platform="cpu")
    # Python may not end while a program is about to call it. A thread's programs run one after the other, so that the
    # last one waits for those before.
    on_cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    last = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), jnp.float32, sharding=on_cpu)).compile()
    atexit.register(lambda: last(np.ones((), np.float32)).block_until_ready())


def _target(axes: Axes) -> str:
    return f"{TARGET}_{axes[0]}{axes[1]}"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# SciPy's BLAS ---------------------------------------------------------------------------------------------------------

_SIGNATURE = b"void (char *, char *, int *, int *, int *, "
_Pointer = ctypes.c_void_p


class _Library(NamedTuple):
    """Fortran's sgemm, and threads that call it beside the one that XLA calls from."""

    sgemm: Callable[..., None]
    helpers: int
    cores: threading.Semaphore  # XLA may multiply twice at the same time; no more pieces at once than there are cores
    waiting: "queue.SimpleQueue[Callable[[], None]]"


@functools.cache
def _library() -> _Library:
    """What `scipy.linalg.cython_blas` offers to compiled modules, left with one thread a call.

    Raises:
      ImportError: SciPy or threadpoolctl is not there.
      LookupError: it is another BLAS than this can call.
    """
    import scipy.linalg.cython_blas
    import threadpoolctl

    capsule = scipy.linalg.cython_blas.__pyx_capi__["sgemm"]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = _Pointer, [ctypes.py_object, ctypes.c_char_p]
    name = name_of(capsule)
    if not name.startswith(_SIGNATURE):
        raise LookupError(f"SciPy's sgemm takes other arguments, {name.decode()}")
    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    # SciPy's own where it brings one: NumPy's keeps its threads.
    libraries = [one for one in libraries if Path(one.filepath).parent.name == "scipy.libs"] or libraries
    if not libraries:
        raise LookupError("threadpoolctl does not know the BLAS that SciPy uses")
    for library in libraries:
        library.set_num_threads(1)
    sgemm = ctypes.CFUNCTYPE(None, *[_Pointer] * 13)(pointer_of(capsule, name))
    helpers, waiting = _cores() - 1, queue.SimpleQueue[Callable[[], None]]()

    def serve() -> None:
        while True:
            waiting.get()()

    for _ in range(helpers):
        threading.Thread(target=serve, name="blas", daemon=True).start()
    return _Library(sgemm, helpers, threading.Semaphore(helpers + 1), waiting)


_ONE, _ZERO = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0))
_AS_IT_IS, _TRANSPOSED = (ctypes.byref(ctypes.c_char(letter)) for letter in (b"N", b"T"))


def _compute(a: "_Buffer", b: "_Buffer", result: "_Buffer", axes: Axes) -> None:
    """Write the product: C = A B by rows is C^T = B^T A^T by columns, as Fortran has it."""
    library = _library()
    inner = a.dims[axes[0]]
    rows, columns = result.dims[0], result.dims[1]
    of_a, of_b = _TRANSPOSED if axes[0] == 0 else _AS_IT_IS, _TRANSPOSED if axes[1] == 1 else _AS_IT_IS
    strides = [ctypes.byref(ctypes.c_int(matrix.dims[1])) for matrix in (b, a, result)]

    def piece(start: int, stop: int) -> tuple[Any, ...]:
        first_row, row_count, first_column, column_count = 0, rows, 0, columns
        if rows >= columns:
            first_row, row_count = start, stop - start
        else:
            first_column, column_count = start, stop - start
        at_a = a.data + 4 * first_row * (1 if axes[0] == 0 else a.dims[1])
        at_b = b.data + 4 * first_column * (b.dims[1] if axes[1] == 1 else 1)
        at_result = result.data + 4 * (first_row * columns + first_column)
        sizes = [ctypes.byref(ctypes.c_int(size)) for size in (column_count, row_count, inner)]
        return (of_b, of_a, *sizes, _ONE, at_b, strides[0], at_a, strides[1], _ZERO, at_result, strides[2])

    longer = max(rows, columns)
    step = -(-longer // (library.helpers + 1) // EDGE) * EDGE
    pieces = [piece(start, min(start + step, longer)) for start in range(0, longer, step)]

    def work() -> None:
        while True:
            try:
                arguments = pieces.pop()
            except IndexError:
                return
            with library.cores:
                library.sgemm(*arguments)

    ended = queue.SimpleQueue[BaseException | None]()

    def help_out() -> None:
        try:
            work()
            ended.put(None)
        except BaseException as error:  # whoever waits is to get it
            ended.put(error)

    for _ in range(library.helpers):
        library.waiting.put(help_out)
    work()
    for error in [ended.get() for _ in range(library.helpers)]:
        if error is not None:
            raise error


# XLA's call -----------------------------------------------------------------------------------------------------------
# Its structures begin with their size and a list of extensions; fields that are not read are left out at their ends.

_BEGINNING: Any = (("struct_size", ctypes.c_size_t), ("extensions", _Pointer))
_EXECUTE = 3  # the stage of a call that computes
_INTERNAL = 13  # the code of an error of our own


class _Version(ctypes.Structure):
    _fields_ = (*_BEGINNING, ("major", ctypes.c_int), ("minor", ctypes.c_int))


class _ErrorArguments(ctypes.Structure):
    _fields_ = (*_BEGINNING, ("message", ctypes.c_char_p), ("code", ctypes.c_int))


class _Api(ctypes.Structure):
    _fields_ = (
        *_BEGINNING, ("version", _Version), ("internal", _Pointer),
        ("create_error", ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_ErrorArguments))),
    )  # fmt: skip


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _Extension(ctypes.Structure):
    """The only kind: XLA asks, once, which version the handler was written for."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t), ("kind", ctypes.c_int), ("next", _Pointer),
        ("metadata", ctypes.POINTER(_Metadata)),
    )  # fmt: skip


class _Buffer(ctypes.Structure):
    _fields_ = (
        *_BEGINNING, ("dtype", ctypes.c_int), ("data", _Pointer), ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )  # fmt: skip


class _Buffers(ctypes.Structure):
    _fields_ = (
        *_BEGINNING, ("size", ctypes.c_int64), ("kinds", _Pointer),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )  # fmt: skip


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t), ("extensions", ctypes.POINTER(_Extension)), ("api", ctypes.POINTER(_Api)),
        ("context", _Pointer), ("stage", ctypes.c_int), ("arguments", _Buffers), ("results", _Buffers),
    )  # fmt: skip


_Handler = ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_CallFrame))


@functools.cache  # which keeps it alive
def _handler(axes: Axes) -> Any:
    def call(pointer: Any) -> Any:
        frame = pointer.contents
        try:
            if frame.extensions:
                metadata, version = frame.extensions.contents.metadata.contents, frame.api.contents.version
                metadata.version.major, metadata.version.minor, metadata.traits = version.major, version.minor, 0
            elif frame.stage == _EXECUTE:
                a, b = (frame.arguments.buffers[place].contents for place in range(2))
                _compute(a, b, frame.results.buffers[0].contents, axes)
        except BaseException as error:  # JAX raises it where the result is asked for
            message = ctypes.c_char_p(f"a product by SciPy's BLAS: {error!r}".encode())
            arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message, _INTERNAL)
            return frame.api.contents.create_error(ctypes.byref(arguments))
        return None

    return _Handler(call)
