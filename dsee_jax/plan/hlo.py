"""What a compiled program does: the operations of its text, loops counted as often as they run.

XLA's own ``cost_analysis`` counts the body of a loop once. Here each instruction of the text counts as often as the loops
around it turn (`jax.lax.scan` has a known number of turns).
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
"""Instructions that move no bytes of their own; nor does what ends or goes on with an asynchronous one."""
_TAKES = frozenset(("dynamic-slice", "slice", "gather"))
"""Instructions that read of their first operand as much as they give."""
_CHIP_ONLY = re.compile(r"S\([1-9]\d*\)")
"""In a layout: lies within the processor, not in the device's memory."""


class Instruction(NamedTuple):
    """One line of a program's text."""

    name: str
    shape: str  # as written
    kind: str
    rest: str  # operands and attributes


class Collective(NamedTuple):
    """What the devices of some mesh axes send one another, every time a program runs."""

    kind: str  # one of `KINDS`
    axes: tuple[str, ...]  # of the mesh
    shape: str  # of what each device gets, as XLA writes it
    count: int  # how often # pyright: ignore[reportIncompatibleMethodOverride]
    bytes: int  # of what each device gets, in all


def nbytes(shape: str, *, memory: bool = False) -> int:
    """Return the bytes of a shape as XLA writes it, ``f32[8,128]{1,0}``, or of a tuple of them.

    With ``memory`` of what lies in the device's memory alone; a TPU's compiler keeps some arrays within the processor.
    """
    total = 0
    for kind, sizes, layout in _SHAPE.findall(shape):
        if memory and _CHIP_ONLY.search(layout):
            continue
        bits = _BITS.get(kind) or int(re.sub(r"\D.*", "", kind[1:]))
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits
    return total // 8


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of every computation by name, and the name of the one that is run."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins and " = " not in line.split("(")[0]:
            current = found.setdefault(begins[1], [])
            entry = begins[1] if line.startswith("ENTRY") else entry
        elif current is not None and (each := _INSTRUCTION.match(line)):
            current.append(Instruction(*each.groups()))
    return found, entry


def turns(instruction: Instruction, bodies: Mapping[str, Sequence[Instruction]]) -> int | None:
    """Return how often a loop runs its body; 1 of anything else, None of a loop whose number the text does not tell.

    Where the compiler does not say it, it is what the condition compares the counter with, which starts at 0.
    """
    if instruction.kind != "while":
        return 1
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest):
        return int(found[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
    limits = [
        int(each.rest.partition(")")[0])
        for each in bodies.get(condition[1] if condition else "", ())
        if each.kind == "constant" and each.shape.startswith("s32[]")
    ]
    return limits[0] if len(limits) == 1 else None


class Counted(NamedTuple):
    """An instruction as a program runs it."""

    instruction: Instruction
    times: int
    fused: bool  # stands inside a fusion
    within: str  # the innermost computation that is no fusion
    shapes: Mapping[str, str]  # of its computation


def counted(text: str) -> list[Counted]:
    """Return every instruction as often as it runs; a loop of unknown length counts once, see `unknown_loops`."""
    bodies, entry = computations(text)
    found = []

    def visit(name: str, times: int, fused: bool, within: str) -> None:
        shapes = {each.name: each.shape for each in bodies.get(name, ())}
        for each in bodies.get(name, ()):
            found.append(Counted(each, times, fused, within, shapes))
            inside = fused or each.kind == "fusion"
            for group in _CALLED.findall(each.rest):
                for called in re.findall(r"[\w.\-]+", group):
                    visit(called, times * (turns(each, bodies) or 1), inside, within if inside else called)

    visit(entry, 1, False, entry)
    return found


def unknown_loops(text: str) -> int:
    """Return how many loops of a program count once because their length is not told."""
    bodies, _ = computations(text)
    return sum(turns(each, bodies) is None for body in bodies.values() for each in body)


def traffic(text: str) -> int:
    """Return the bytes that a device reads and writes in its memory: operands and results of what is not inside a fusion.

    Of an operand that is only sliced or looked up what is taken counts, of a result that is an operand with a slice written
    into it the slice.
    """
    bodies, _ = computations(text)
    return sum(each.times * _moved(each, bodies) for each in counted(text) if not each.fused)


def _moved(each: Counted, bodies: Mapping[str, Sequence[Instruction]]) -> int:
    one, kind = each.instruction, each.instruction.kind
    if kind in _FREE or kind.endswith(("-done", "-update")):
        return 0
    operands = [nbytes(each.shapes.get(name, ""), memory=True) for name in _operands(one)]
    result = nbytes(one.shape, memory=True)
    if kind.endswith("-start") and one.shape.startswith("("):
        # It names what goes in beside what comes out.
        arrays = [f"{dtype}[{sizes}]{layout}" for dtype, sizes, layout in _SHAPE.findall(one.shape) if sizes]
        taken = arrays[-1] if kind.removesuffix("-start") in _TAKES and arrays else ""
        return nbytes(taken) + nbytes(taken, memory=True) if taken else result
    if kind in _TAKES:
        return min(operands[0], result) + result if operands else result
    if kind == "dynamic-update-slice":
        return 2 * operands[1] if len(operands) > 1 else result
    called = re.search(r"calls=%?([\w.\-]+)", one.rest)
    if kind != "fusion" or not called:
        return result + sum(operands)
    body = bodies.get(called[1], ())
    return sum(_read(body, number, size) for number, size in enumerate(operands)) + _written(body, result)


def _operands(one: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", one.rest.split("), ")[0])


def _read(body: Sequence[Instruction], number: int, size: int) -> int:
    """Return what a fusion reads of its operand ``number`` of ``size`` bytes."""
    mine = {one.name for one in body if one.kind == "parameter" and one.rest.startswith(f"{number})")}
    sizes = {one.name: nbytes(one.shape) for one in body}
    taken = 0
    for one in body:
        places = [place for place, name in enumerate(_operands(one)) if name in mine]
        if not places:
            continue
        if one.kind == "bitcast":
            mine.add(one.name)
        elif one.kind in _TAKES and places == [0]:
            taken += sizes[one.name]
        elif one.kind != "dynamic-update-slice" or places != [0]:
            return size
    return min(taken, size)


def _written(body: Sequence[Instruction], result: int) -> int:
    """Return what a fusion writes of its results of ``result`` bytes in memory."""
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
    """Return what is sent, by kind, mesh axes and shape; the most bytes first. ``mesh``: sizes by axis, in order."""
    counts: Counter[tuple[str, tuple[str, ...], str]] = Counter()
    seen: set[tuple[str, str, str]] = set()
    for each, times, _, within, _ in counted(text):
        kind = each.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        # A TPU's compiler writes one that runs beside other work into each fusion that it runs beside.
        channel = re.search(r"channel_id=(\d+)", each.rest)
        if channel and (kind, channel[1], within) in seen:
            continue
        seen.add((kind, channel[1] if channel else each.name, within))
        shapes = [f"{dtype}[{sizes}]" for dtype, sizes, _ in _SHAPE.findall(each.shape)]
        # What starts an asynchronous one names what goes in before what comes out, and may end in flags.
        if each.kind.endswith("-start") and kind != "all-reduce":
            arrays = [shape for shape in shapes if not shape.endswith("[]")]
            shapes = arrays[len(arrays) // 2 :] or shapes
        for shape in shapes:
            counts[kind, _axes(each.rest, mesh), shape] += times
    rows = [Collective(kind, axes, shape, n, n * nbytes(shape)) for (kind, axes, shape), n in counts.items()]
    return sorted((row for row in rows if row.axes), key=lambda row: -row.bytes)


def _axes(attributes: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the first group of devices of a collective lies."""
    sizes = tuple(mesh.values())
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = (tuple(map(int, part.split(","))) if part else () for part in found.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        group = (ids.transpose(order) if order else ids).reshape(shape)[0]
    elif found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", attributes):
        # Devices in order on a mesh of the compiler's own, and the axes of that.
        own = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        inside = re.findall(r"'([^']+)'", found[2])
        ids = np.arange(math.prod(own.values())).reshape(tuple(own.values()))
        group = ids[tuple(slice(None) if name in inside else 0 for name in own)].ravel()
    elif found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        group = np.array([int(number) for number in found[1].split(",")])
    elif found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes):
        pairs = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", found[1])]
        group = np.array(next((pair for pair in pairs if pair[0] != pair[1]), pairs[0]))
    else:
        group = np.arange(math.prod(sizes))
    places = np.array(np.unravel_index(group, sizes))
    return tuple(name for name, along in zip(mesh, places, strict=True) if (along != along[0]).any())


def wire(row: Collective, mesh: Mapping[str, int]) -> float:
    """Return the bytes that a device sends for a collective on a ring of its axes."""
    count = math.prod(mesh[axis] for axis in row.axes)
    share = (count - 1) / count
    return row.bytes * {"all-reduce": 2 * share, "reduce-scatter": count - 1, "collective-permute": 1}.get(
        row.kind, share
    )


def multiply_adds(function: Any, *args: Any) -> int:
    """Return the multiply-adds of all matrix products of a function of (abstract) arrays, loops counted in full."""
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
    found = []
    for value in values:
        if hasattr(value, "jaxpr"):
            found.append(value.jaxpr if hasattr(value.jaxpr, "eqns") else value.jaxpr.jaxpr)
        elif hasattr(value, "eqns"):
            found.append(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found += _inner(value)
    return found
