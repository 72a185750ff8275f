"""Memory traffic, collectives and FLOPs of a compiled program, from its HLO text, with loops counted per iteration.

XLA's own ``cost_analysis`` counts the body of a loop once. Here an instruction counts once per iteration of the loops
around it (`jax.lax.scan` has a known trip count).
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_SHAPE = re.compile(r"\b(pred|bf16|f8\w*|[sufc]\d+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_FREE = frozenset(
    (
        *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "iota"),
        *("after-all", "partition-id", "replica-id", "opt-barrier"),
    )
)
"""Instructions without memory traffic; the ``-done`` and ``-update`` halves of asynchronous instructions have none either."""
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
"""Instructions that read as many bytes of their first operand as their result has."""
_CHIP_ONLY = re.compile(r"S\([1-9]\d*\)")
"""The layout of an array in memory of the processor, outside the device's main memory."""


class Instruction(NamedTuple):
    """One instruction, a line of HLO text."""

    name: str
    shape: str  # HLO text, such as f32[8,128]{1,0}
    kind: str  # opcode
    rest: str  # operands and attributes


class Collective(NamedTuple):
    """All collectives of one kind, shape and set of mesh axes in one run of a program."""

    kind: str  # one of `KINDS`
    axes: tuple[str, ...]  # of the mesh
    shape: str  # of the result on each device, as HLO text
    count: int  # executions # pyright: ignore[reportIncompatibleMethodOverride]
    bytes: int  # of the results on each device, over all executions


def nbytes(shape: str, *, memory: bool = False) -> int:
    """Return the bytes of an HLO shape such as ``f32[8,128]{1,0}``, or of a tuple of shapes.

    ``memory`` counts only arrays in the device's main memory; a TPU's compiler keeps some arrays in the processor.
    """
    total = 0
    for kind, sizes, layout in _SHAPE.findall(shape):
        if memory and _CHIP_ONLY.search(layout):
            continue
        bits = _BITS.get(kind) or int(re.sub(r"\D.*", "", kind[1:]))
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits
    return total // 8


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of every computation by name, and the name of the entry computation."""
    bodies: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and " = " not in line.split("(")[0]:
            current = bodies.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (each := _INSTRUCTION.match(line)):
            current.append(Instruction(*each.groups()))
    return bodies, entry


def trip_count(instruction: Instruction, bodies: Mapping[str, Sequence[Instruction]]) -> int | None:
    """Return the iterations of a loop; 1 for any other instruction, None for a loop of unknown length.

    Without the compiler's ``known_trip_count`` the result is the limit in the loop's condition; the counter starts at 0.
    """
    if instruction.kind != "while":
        return 1
    if trips := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest):
        return int(trips[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
    limits = [
        int(each.rest.partition(")")[0])
        for each in bodies.get(condition[1] if condition else "", ())
        if each.kind == "constant" and each.shape.startswith("s32[]")
    ]
    return limits[0] if len(limits) == 1 else None


class Execution(NamedTuple):
    """An instruction with the number of its executions."""

    instruction: Instruction
    times: int
    fused: bool  # whether a fusion contains the instruction
    within: str  # the innermost computation that is no fusion
    shapes: Mapping[str, str]  # of all instructions of its computation, by name


def executions(text: str) -> list[Execution]:
    """Return every instruction with its executions; a loop of unknown length counts as one iteration (`unknown_loops`)."""
    bodies, entry = computations(text)
    result = []

    def visit(name: str, times: int, fused: bool, within: str) -> None:
        shapes = {each.name: each.shape for each in bodies.get(name, ())}
        for each in bodies.get(name, ()):
            result.append(Execution(each, times, fused, within, shapes))
            inside = fused or each.kind == "fusion"
            for group in _CALLED.findall(each.rest):
                for called in re.findall(r"[\w.\-]+", group):
                    visit(called, times * (trip_count(each, bodies) or 1), inside, within if inside else called)

    visit(entry, 1, False, entry)
    return result


def unknown_loops(text: str) -> int:
    """Return the number of loops of unknown length."""
    bodies, _ = computations(text)
    return sum(trip_count(each, bodies) is None for body in bodies.values() for each in body)


def traffic(text: str) -> int:
    """Return the bytes that a device reads from and writes to its memory: operands and results outside of fusions.

    A sliced or gathered operand counts with the bytes of the slice, an operand updated in place with those of the update.
    """
    bodies, _ = computations(text)
    return sum(each.times * _instruction_traffic(each, bodies) for each in executions(text) if not each.fused)


def _instruction_traffic(each: Execution, bodies: Mapping[str, Sequence[Instruction]]) -> int:
    """Return the bytes that one execution reads and writes."""
    one, kind = each.instruction, each.instruction.kind
    if kind in _FREE or kind.endswith(("-done", "-update")):
        return 0
    operands = [nbytes(each.shapes.get(name, ""), memory=True) for name in _operands(one)]
    result = nbytes(one.shape, memory=True)
    if kind.endswith("-start") and one.shape.startswith("("):
        # The tuple of an asynchronous start has its operands and its results.
        arrays = [f"{dtype}[{sizes}]{layout}" for dtype, sizes, layout in _SHAPE.findall(one.shape) if sizes]
        part = arrays[-1] if kind.removesuffix("-start") in _SLICES and arrays else ""
        return nbytes(part) + nbytes(part, memory=True) if part else result
    if kind in _SLICES:
        return min(operands[0], result) + result if operands else result
    if kind == "dynamic-update-slice":
        return 2 * operands[1] if len(operands) > 1 else result
    called = re.search(r"calls=%?([\w.\-]+)", one.rest)
    if kind != "fusion" or not called:
        return result + sum(operands)
    body = bodies.get(called[1], ())
    reads = sum(_bytes_read(body, number, size) for number, size in enumerate(operands))
    return reads + _bytes_written(body, result)


def _operands(one: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", one.rest.split("), ")[0])


def _bytes_read(body: Sequence[Instruction], number: int, size: int) -> int:
    """Return the bytes that a fusion reads of its operand ``number``, which has ``size`` bytes."""
    aliases = {one.name for one in body if one.kind == "parameter" and one.rest.startswith(f"{number})")}
    sizes = {one.name: nbytes(one.shape) for one in body}
    total = 0
    for one in body:
        places = [place for place, name in enumerate(_operands(one)) if name in aliases]
        if not places:
            continue
        if one.kind == "bitcast":
            aliases.add(one.name)
        elif one.kind in _SLICES and places == [0]:
            total += sizes[one.name]
        elif one.kind != "dynamic-update-slice" or places != [0]:
            return size
    return min(total, size)


def _bytes_written(body: Sequence[Instruction], result: int) -> int:
    """Return the bytes that a fusion writes to memory, of ``result`` bytes of results: less where it updates in place."""
    by_name = {one.name: one for one in body}
    sizes = {one.name: nbytes(one.shape) for one in body}
    root = body[-1] if body else None
    roots = [by_name.get(name) for name in _operands(root)] if root and root.kind == "tuple" else [root]
    saved = 0
    for one in roots:
        while one is not None and one.kind == "bitcast":
            one = by_name.get(next(iter(_operands(one)), ""))
        if one is not None and one.kind == "dynamic-update-slice":
            saved += sizes[one.name] - sizes.get(_operands(one)[1], 0)
    return max(result - saved, 0)


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Return the collectives by kind, mesh axes and shape, largest bytes first; ``mesh`` has the axis sizes in order."""
    counts: Counter[tuple[str, tuple[str, ...], str]] = Counter()
    seen: set[tuple[str, str, str]] = set()
    for each, times, _, within, _ in executions(text):
        kind = each.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        # A TPU's compiler repeats an asynchronous collective in every fusion that overlaps it.
        channel = re.search(r"channel_id=(\d+)", each.rest)
        if channel and (kind, channel[1], within) in seen:
            continue
        seen.add((kind, channel[1] if channel else each.name, within))
        shapes = [f"{dtype}[{sizes}]" for dtype, sizes, _ in _SHAPE.findall(each.shape)]
        # The tuple of an asynchronous start has operands, results and perhaps scalar flags, in this order.
        if each.kind.endswith("-start") and kind != "all-reduce":
            arrays = [shape for shape in shapes if not shape.endswith("[]")]
            shapes = arrays[len(arrays) // 2 :] or shapes
        for shape in shapes:
            counts[kind, _axes(each.rest, mesh), shape] += times
    rows = [Collective(kind, axes, shape, n, n * nbytes(shape)) for (kind, axes, shape), n in counts.items()]
    return sorted((row for row in rows if row.axes), key=lambda row: -row.bytes)


def _axes(attributes: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the first device group of a collective extends."""
    sizes = tuple(mesh.values())
    if groups := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = (tuple(map(int, part.split(","))) if part else () for part in groups.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        group = (ids.transpose(order) if order else ids).reshape(shape)[0]
    elif groups := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", attributes):
        # The groups extend along axes of the compiler's own mesh, which has the devices in order.
        own = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", groups[1])}
        inside = re.findall(r"'([^']+)'", groups[2])
        ids = np.arange(math.prod(own.values())).reshape(tuple(own.values()))
        group = ids[tuple(slice(None) if name in inside else 0 for name in own)].ravel()
    elif groups := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        group = np.array([int(number) for number in groups[1].split(",")])
    elif links := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes):
        pairs = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", links[1])]
        group = np.array(next((pair for pair in pairs if pair[0] != pair[1]), pairs[0]))
    else:
        group = np.arange(math.prod(sizes))
    places = np.array(np.unravel_index(group, sizes))
    return tuple(name for name, along in zip(mesh, places, strict=True) if (along != along[0]).any())


def bytes_sent(row: Collective, mesh: Mapping[str, int]) -> float:
    """Return the bytes that a device sends for a collective, with a ring algorithm over its axes."""
    count = math.prod(mesh[axis] for axis in row.axes)
    share = (count - 1) / count
    return row.bytes * {"all-reduce": 2 * share, "reduce-scatter": count - 1, "collective-permute": 1}.get(
        row.kind, share
    )


def multiply_adds(function: Any, *args: Any) -> int:
    """Return the multiply-adds of all matrix products of a function of (abstract) arrays, over all iterations of scans."""
    return _products(jax.make_jaxpr(function)(*args).jaxpr)


def _products(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += length * sum(_products(inner) for inner in _inner(equation.params.values()))
    return total


def _inner(values: Iterable[Any]) -> list[Any]:
    """Return the jaxprs among the parameters of an equation."""
    jaxprs = []
    for value in values:
        if hasattr(value, "jaxpr"):
            jaxprs.append(value.jaxpr if hasattr(value.jaxpr, "eqns") else value.jaxpr.jaxpr)
        elif hasattr(value, "eqns"):
            jaxprs.append(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            jaxprs += _inner(value)
    return jaxprs
