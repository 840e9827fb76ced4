"""What a compiled program does, read from its text: operations, memory traffic and what devices send each other.

XLA's own `cost_analysis` counts the body of a loop once; here every loop counts as often as it runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sra_jax.models import blas

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
TRANSFERS = {
    "ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
"""What libtpu calls collectives between slices, which it writes as a `send` and a `recv` of each device."""

FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "copy-done", "opt-barrier",
})  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array: its type, its shape, and whether it lies in the device's main memory (TPUs have faster ones)."""

    dtype: str
    shape: tuple[int, ...]
    main: bool = True

    @property
    def bytes(self) -> float:
        """Its size without padding."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """The name or number after `key=`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found and found[1]

    def needed(self, key: str) -> str:
        """`attribute` where the text must have it.

        Raises:
          ValueError: it has not.
        """
        value = self.attribute(key)
        if value is None:
            raise ValueError(f"{self.name} ({self.opcode}) has no {key}: {self.rest[:200]}")
        return value


@dataclasses.dataclass
class Cost:
    """What a program does on one device.

    Attributes:
      flops: of matrix products and convolutions, 2 for a multiplication with its addition.
      kernels: (FLOPs, bytes read from and written to main memory) of each kernel, times its number of runs.
      sent: bytes that a device sends to others by kind of collective, with ring algorithms.
      crossing: of `sent`, the bytes that go to another slice.
      unknown_loops: loops whose number of runs could not be read; they are counted once.
    """

    flops: float = 0.0
    kernels: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    sent: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    crossing: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    unknown_loops: int = 0

    @property
    def memory_bytes(self) -> float:
        """Bytes read from and written to main memory."""
        return sum(size for _, size in self.kernels)

    def kernel_seconds(self, peak_flops: float, bandwidth: float) -> float:
        """Time of all kernels in turn, each as long as its arithmetic or its traffic, whichever is longer."""
        return sum(max(flops / peak_flops, size / bandwidth) for flops, size in self.kernels)


class Program:
    """A compiled program's text (`compiled.as_text()`) as computations of instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if (found := _COMPUTATION.match(line)) and " = " not in line.split("{")[0].split("(")[0]:
                current = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(found[2], found[3], bool(found[1]))
                current[instruction.name] = instruction

    def instructions(self) -> Iterator[Instruction]:
        """All instructions of all computations."""
        for computation in self.computations.values():
            yield from computation.values()

    def cost(self, slices: int = 1) -> Cost:
        """Operations, traffic and collectives of one run.

        Args:
          slices: on which the devices lie.
        """
        cost = Cost()
        chained: dict[str, tuple[str, float]] = {}
        self._add(self.entry, 1, cost, chained, slices)
        for kind, size in chained.values():
            cost.sent[kind] += size
        return cost

    def _add(
        self, computation: str, runs: int, cost: Cost, chained: dict[str, tuple[str, float]], slices: int
    ) -> None:
        body = self.computations[computation]
        for instruction in body.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = self.trip_count(instruction, body)
                cost.unknown_loops += trips is None
                self._add(instruction.needed("body"), runs * (trips or 1), cost, chained, slices)
            elif opcode == "conditional":
                for branch in _branches(instruction)[:1]:
                    self._add(branch, runs, cost, chained, slices)
            elif opcode == "call":
                self._add(instruction.needed("to_apply"), runs, cost, chained, slices)
            elif opcode not in FREE:
                flops = self._flops(instruction, body)
                cost.flops += runs * flops
                cost.kernels.append((runs * flops, runs * self._traffic(instruction, body)))
                self._add_collectives(instruction, body, runs, cost, chained, slices)

    def _add_collectives(
        self, instruction: Instruction, body: Mapping[str, Instruction], runs: int, cost: Cost,
        chained: dict[str, tuple[str, float]], slices: int,
    ) -> None:
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            if kind == "all-reduce" and _is_sliced(instruction, body):
                kind = "reduce-scatter"
            size = runs * _sent(kind, instruction, body)
            if "chain_id" in instruction.rest:
                # TPU programs cut a collective into pieces that run inside several kernels; each piece shows the whole.
                key = f"{instruction.attribute('channel_id')}"
                chained[key] = max(chained.get(key, (kind, 0.0)), (kind, size))
            else:
                cost.sent[kind] += size
        elif found := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest) if kind == "send" else None:
            kind = TRANSFERS.get(found[1], found[1])
            size = runs * _by_ring(kind, sum(a.bytes for n in instruction.operands for a in body[n].arrays), slices)
            cost.sent[kind] += size
            cost.crossing[kind] += size
        elif inner := self._inner(instruction):
            for part in inner.values():
                self._add_collectives(part, inner, runs, cost, chained, slices)

    def _inner(self, instruction: Instruction) -> Mapping[str, Instruction] | None:
        if instruction.opcode in ("fusion", "async-start"):
            return self.computations.get(instruction.attribute("calls") or "")
        return None

    def _flops(self, instruction: Instruction, body: Mapping[str, Instruction]) -> float:
        if instruction.opcode == "dot":
            left = body[instruction.operands[0]].arrays[0].shape
            contracted = _numbers(instruction.rest, "lhs_contracting_dims")
            return 2 * math.prod(instruction.arrays[0].shape) * math.prod(left[d] for d in contracted)
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, body)
        if instruction.opcode == "custom-call":
            return _kernel_flops(instruction, body)
        inner = self._inner(instruction)
        return sum(self._flops(part, inner) for part in inner.values()) if inner else 0.0

    def _traffic(self, instruction: Instruction, body: Mapping[str, Instruction]) -> float:
        """Bytes that one kernel reads and writes; of an array that is sliced or updated in place, the slice alone."""
        moves = (*COLLECTIVES, "send", "recv")
        if instruction.opcode.endswith("-done") or instruction.opcode.removesuffix("-start") in moves:
            return 0.0
        if instruction.opcode in ("dynamic-slice", "slice"):
            return 2 * _size(instruction.arrays)
        if instruction.opcode == "slice-start":  # of its source, its result and its state
            return instruction.arrays[1].bytes + _size(instruction.arrays[1:2])
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _size(body[instruction.operands[1]].arrays)
        inner = self._inner(instruction)
        operands = [body[name] for name in instruction.operands]
        if instruction.opcode == "custom-call":  # a kernel that gets an array several times reads parts of it
            operands = list({source.name: source for source in (_source(body, each) for each in operands)}.values())
        if not inner:
            copies = instruction.arrays[:1] if instruction.opcode == "copy-start" else instruction.arrays
            return _size(copies) + sum(_size(operand.arrays) for operand in operands)
        root = next(part for part in inner.values() if part.root)
        return self._written(inner, root) + sum(
            self._read(inner, part)
            for part in inner.values() if part.opcode == "parameter" and _size(operands[int(part.rest)].arrays)
        )  # fmt: skip

    def _written(self, body: Mapping[str, Instruction], made: Instruction) -> float:
        """Bytes of a kernel's result that it writes to main memory."""
        if made.opcode == "tuple":
            return sum(self._written(body, body[name]) for name in made.operands)
        if made.opcode == "bitcast":
            return self._written(body, body[made.operands[0]])
        if made.opcode == "dynamic-update-slice":
            return min(_size(body[made.operands[1]].arrays) or math.inf, _size(made.arrays))
        if inner := self._inner(made):
            return self._written(inner, next(part for part in inner.values() if part.root))
        return 0.0 if made.opcode == "parameter" else _size(made.arrays)

    def _read(self, body: Mapping[str, Instruction], source: Instruction) -> float:
        """Bytes of `source` that a kernel reads: slices where it only slices, nothing where it only updates."""
        whole, total = sum(array.bytes for array in source.arrays), 0.0
        for user in body.values():
            if source.name not in user.operands:
                continue
            if user.opcode == "dynamic-slice":
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
                continue
            elif user.opcode == "bitcast":
                total += self._read(body, user)
            elif inner := self._inner(user):
                number = user.operands.index(source.name)
                part = next(p for p in inner.values() if p.opcode == "parameter" and int(p.rest) == number)
                total += self._read(inner, part)
            else:
                return whole
        return min(total, whole)

    def trip_count(self, loop: Instruction, body: Mapping[str, Instruction]) -> int | None:
        """How often a loop runs, or None where the text does not say."""
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
            return int(known[1])
        condition = self.computations[loop.needed("condition")]
        root = next(i for i in condition.values() if i.root)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        counter, limit = (condition[name] for name in root.operands)
        stop = _constant(limit)
        if stop is None or counter.opcode != "get-tuple-element":
            return None
        index = int(counter.needed("index"))
        start = _resolve(body, loop.operands[0], index)
        step = self._step(loop.needed("body"), index)
        return None if start is None or not step else -(-(stop - start) // step)

    def _step(self, name: str, index: int) -> int | None:
        """By how much a loop's body raises entry `index` of its state."""
        body = self.computations[name]
        new = body[next(i for i in body.values() if i.root).operands[index]]
        while new.opcode in ("copy", "bitcast"):
            new = body[new.operands[0]]
        if new.opcode == "add":
            steps = [_constant(body[operand]) for operand in new.operands if operand in body]
            return next((s for s in steps if s is not None), None)
        inner = self._inner(new)
        if inner:
            constants = [_constant(part) for part in inner.values() if part.opcode == "constant"]
            return constants[0] if len(constants) == 1 else None
        return None


def _parse(name: str, text: str, root: bool) -> Instruction:
    depth = 0
    for end, character in enumerate(text):  # noqa: B007
        depth += (character == "(") - (character == ")")
        if character == " " and depth == 0:
            break
    kind, call = text[:end], text[end + 1 :]
    opcode, _, arguments = call.partition("(")
    depth = 1
    for close, character in enumerate(arguments):  # noqa: B007
        depth += (character == "(") - (character == ")")
        if depth == 0:
            break
    inside = arguments[:close]
    rest = inside if opcode in ("parameter", "constant") else arguments[close + 1 :]
    return Instruction(name, opcode, _arrays(kind), tuple(_OPERAND.findall(inside)), rest, root)


def _arrays(kind: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), not re.search(r"S\([1-9]", layout))
        for dtype, shape, layout in _ARRAY.findall(kind)
        if dtype in BYTES
    )


def _size(arrays: Sequence[Array]) -> float:
    return sum(array.bytes for array in arrays if array.main)


def _numbers(text: str, key: str) -> tuple[int, ...]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", text)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()


def _constant(instruction: Instruction) -> int | None:
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.rest.strip()):
        return int(instruction.rest)
    return None


def _resolve(body: Mapping[str, Instruction], name: str, index: int) -> int | None:
    """The constant at entry `index` of the tuple `name`."""
    instruction = body.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "opt-barrier"):
        instruction = body.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "tuple":
        return None
    entry = body.get(instruction.operands[index])
    while entry is not None and entry.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        entry = body.get(entry.operands[0])
    if entry is None or entry.opcode == "get-tuple-element":
        return None
    return 0 if entry.opcode == "broadcast" else _constant(entry)


def _branches(instruction: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
        return _OPERAND.findall(found[1])
    return [instruction.needed("true_computation")]


def _is_sliced(instruction: Instruction, body: Mapping[str, Instruction]) -> bool:
    """Whether a kernel of TPU programs takes its own part of an all-reduce: their way to write a reduce-scatter."""
    root = next(i for i in body.values() if i.root)
    return root.opcode == "dynamic-slice" and root.operands[0] == instruction.name


def _sent(kind: str, instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """Bytes that a device sends in one collective by a ring algorithm."""
    size = sum(array.bytes for name in instruction.operands if name in body for array in body[name].arrays)
    return _by_ring(kind, size, 1 if kind == "collective-permute" else group_size(instruction.rest))


def _by_ring(kind: str, size: float, members: int) -> float:
    """Bytes that one of so many members sends in a collective, each giving `size` bytes."""
    if kind == "collective-permute":
        return size
    others = max(members - 1, 0)
    share = others / (others + 1)
    return {"all-gather": size * others, "all-reduce": 2 * size * share}.get(kind, size * share)


def group_size(attributes: str) -> int:
    """Devices that take part in one collective."""
    return groups(attributes).shape[1]


def groups(attributes: str) -> np.ndarray:
    """Which devices take part in a collective together, from any of the ways in which its text gives them.

    Returns:
      (number of groups, devices of a group) int, counted in the order of the mesh; of a permutation, the pairs.
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        together = re.findall(r"'(\w+)'", found[2])
        axes = [axis for axis, name in enumerate(sizes) if name not in together]
        axes += [list(sizes).index(name) for name in together]
        ids = re.search(r"device_ids=\((\[[^)]*?\](?:T\([\d,]+\))?)\)", attributes)
        devices = (_iota(ids[1]) if ids else np.arange(math.prod(sizes.values()))).reshape(*sizes.values())
        return devices.transpose(axes).reshape(-1, math.prod(sizes[name] for name in together))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\](?:<=(\[[\d,]+\](?:T\([\d,]+\))?))?", attributes):
        count, size = int(found[1]), int(found[2])
        return (_iota(found[3]) if found[3] else np.arange(count * size)).reshape(count, size)
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", attributes):
        return np.asarray([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    raise ValueError(f"how many devices take part is not clear from: {attributes[:200]}")


def _iota(text: str) -> np.ndarray:
    """`[8,4]T(1,0)`: the numbers from 0 on in this shape, its axes transposed."""
    shape, _, order = text.partition("T")
    numbers = np.arange(math.prod(sides := [int(n) for n in re.findall(r"\d+", shape)])).reshape(sides)
    return numbers.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else numbers


def _source(body: Mapping[str, Instruction], instruction: Instruction) -> Instruction:
    """The instruction that made the array of a bitcast."""
    while instruction.opcode == "bitcast":
        instruction = body[instruction.operands[0]]
    return instruction


def _kernel_flops(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """Of a kernel that is no operation of the compiler: what its author says, or what is known of it by name."""
    if said := re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.rest):
        return float(said[1])
    for name, products in SPLASH_PRODUCTS.items():
        if instruction.name.startswith(name):  # of queries (B,H,N,d) with all keys
            shapes = [array.shape for each in instruction.operands for array in body[each].arrays]
            batch, heads, tokens, width = next(shape for shape in shapes if len(shape) == 4)
            return 2.0 * products * batch * heads * tokens**2 * width
    if found := re.search(rf'custom_call_target="{blas.TARGET}_(\d)\d"', instruction.rest):
        inner = body[instruction.operands[0]].arrays[0].shape[int(found[1])]
        return 2.0 * inner * math.prod(instruction.arrays[0].shape)
    return 0.0


SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
"""Matrix products of JAX's attention kernel, which states no cost: forward, and backward in one."""


def _convolution_flops(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """Multiplications that touch data: TPU programs write batched products as convolutions over mostly holes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        raise ValueError(f"{instruction.name} does not say which of its dimensions are which: {instruction.rest[:200]}")
    lhs_labels, rhs_labels, out_labels = labels.groups()
    lhs, rhs = (body[name].arrays[0].shape for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    options = re.search(r"window=\{([^}]*)\}", instruction.rest)
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w\-]+)", options[1] if options else "")}

    def along(key: str, dimension: int, default: str) -> str:
        return window[key][dimension] if key in window else default

    total = 2 * out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for dimension in range(len(out) - 2):
        label = str(dimension)
        stride, hole = int(along("stride", dimension, "1")), int(along("lhs_dilate", dimension, "1"))
        spread = int(along("rhs_dilate", dimension, "1"))
        before = int(along("pad", dimension, "0_0").split("_")[0])
        extent = (lhs[lhs_labels.index(label)] - 1) * hole + 1
        places = (
            i * stride + k * spread - before
            for i in range(out[out_labels.index(label)])
            for k in range(rhs[rhs_labels.index(label)])
        )
        total *= sum(0 <= place < extent and place % hole == 0 for place in places)
    return total / int(instruction.attribute("batch_group_count") or 1)
