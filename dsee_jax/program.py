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
_SHAPE = re.compile(r"\b(pred|bf16|f8\w*|[sufc]\d+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_FREE = frozenset(
    (
        *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "iota"),
        *("after-all", "partition-id", "opt-barrier", "async-done", "copy-done", "all-gather-done", "all-reduce-done"),
        "collective-permute-done",
    )
)
"""Instructions that move no bytes of their own."""


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
    count: int  # how often
    bytes: int  # of what each device gets, in all


def nbytes(shape: str) -> int:
    """Return the bytes of a shape as XLA writes it, ``f32[8,128]{1,0}``, or of a tuple of them."""
    total = 0
    for kind, sizes in _SHAPE.findall(shape):
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


def turns(instruction: Instruction, bodies: Mapping[str, Sequence[Instruction]]) -> int:
    """Return how often a loop runs its body; 1 of anything else, and of a loop whose number the text does not tell.

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
    return limits[0] if len(limits) == 1 else 1


def counted(text: str) -> list[tuple[Instruction, int, bool, Mapping[str, str]]]:
    """Return every instruction, how often it runs, whether it stands inside a fusion, and the shapes of its computation."""
    bodies, entry = computations(text)
    found = []

    def visit(name: str, times: int, fused: bool) -> None:
        shapes = {each.name: each.shape for each in bodies.get(name, ())}
        for each in bodies.get(name, ()):
            found.append((each, times, fused, shapes))
            for group in _CALLED.findall(each.rest):
                for called in re.findall(r"[\w.\-]+", group):
                    visit(called, times * turns(each, bodies), fused or each.kind == "fusion")

    visit(entry, 1, False)
    return found


def traffic(text: str) -> int:
    """Return the bytes that a device reads and writes in its memory: operands and results of what is not inside a fusion."""
    total = 0
    for each, times, fused, shapes in counted(text):
        if fused or each.kind in _FREE:
            continue
        operands = re.findall(r"%([\w.\-]+)", each.rest.split("), ")[0])
        total += times * (nbytes(each.shape) + sum(nbytes(shapes.get(name, "")) for name in operands))
    return total


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Return what is sent, by kind, mesh axes and shape; the most bytes first. ``mesh``: sizes by axis, in order."""
    counts: Counter[tuple[str, tuple[str, ...], str]] = Counter()
    for each, times, _, _ in counted(text):
        kind = each.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        shapes = [f"{dtype}[{sizes}]" for dtype, sizes in _SHAPE.findall(each.shape)]
        # What starts an asynchronous one names what goes in before what comes out.
        if each.kind.endswith("-start") and kind != "all-reduce":
            shapes = shapes[len(shapes) // 2 :][: len(shapes) // 2] or shapes
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
