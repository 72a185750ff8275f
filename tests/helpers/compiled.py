"""Counts of the work of a program: the matrix products of its jaxpr or of its compiled form, and the arrays that it moves.

Counts of a compiled program are those of executions: the body of a loop counts once per iteration, the body of a loop of
unknown length once.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.extend

from dsee_jax.plan import hlo

SMALL = frozenset(("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call"))
"""Opcodes of instructions that write no array of their own."""


class Product(NamedTuple):
    """A matrix product (rows, terms) @ (terms, columns), ``batch`` times; rows are not more than columns.

    A compiler may compute the transposed product, so the two sides have no order.
    """

    rows: int
    columns: int
    terms: int
    batch: int = 1


def product(rows: int, terms: int, columns: int, *, batch: int = 1) -> Product:
    """Return the product (rows, terms) @ (terms, columns)."""
    return Product(min(rows, columns), max(rows, columns), terms, batch)


def _of_dot(
    left: tuple[int, ...], right: tuple[int, ...], contracted: tuple[list[int], list[int]], batch: list[int]
) -> Product:
    """Return the product of a general dot, from the shapes of its operands and their contracted axes."""
    terms, many = math.prod(left[axis] for axis in contracted[0]), math.prod(left[axis] for axis in batch)
    return product(math.prod(left) // (terms * many), terms, math.prod(right) // (terms * many), batch=many)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of those inside of it, each once."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def traced_products(function: Any, *arguments: Any) -> Counter[Product]:
    """Return the matrix products in the jaxpr of a function, without regard to loops."""
    products: Counter[Product] = Counter()
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "dot_general":
            contracted, (batch, _) = equation.params["dimension_numbers"]
            left, right = (each.aval.shape for each in equation.invars)
            products[_of_dot(left, right, contracted, batch)] += 1
    return products


def products(text: str) -> Counter[Product]:
    """Return the matrix products of a compiled program.

    Products with a vector or of two vectors are left out: compilers turn some of them into sums.
    """
    counts: Counter[Product] = Counter()
    for each in hlo.executions(text):
        kind, rest = each.instruction.kind, each.instruction.rest
        assert not (kind == "custom-call" and re.search("matmul|gemm|dot", rest)), f"not known as a product: {rest}"
        if kind == "dot":
            left, right = (dimensions(each.shapes[name]) for name in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            axes = {name: _numbers(rest, name) for name in ("lhs_contracting", "rhs_contracting", "lhs_batch")}
            one = _of_dot(left, right, (axes["lhs_contracting"], axes["rhs_contracting"]), axes["lhs_batch"])
            if 1 not in one[:3]:
                counts[one] += each.times
    return counts


def _numbers(rest: str, name: str) -> list[int]:
    """Return the axes of an attribute of a dot, such as ``lhs_batch_dims={0,1}``; none where it is left out."""
    found = re.search(rf"{name}_dims=\{{([\d,]*)\}}", rest)
    return [int(number) for number in found[1].split(",") if number] if found else []


def dimensions(shape: str) -> tuple[int, ...]:
    """Return the sizes of an HLO shape such as ``f32[8,128]{1,0}``."""
    return tuple(int(size) for size in shape.partition("[")[2].partition("]")[0].split(",") if size)


def results(text: str, *kinds: str) -> Counter[tuple[int, ...]]:
    """Return the shapes of the results of instructions with these opcodes, also inside of fusions.

    A shape has its sizes in ascending order, without ones: it is that of a transposed or reshaped array too.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for each in hlo.executions(text):
        if each.instruction.kind in kinds:
            counts[sizes(dimensions(each.instruction.shape))] += each.times
    return counts


def sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of a shape as `results` has them."""
    return tuple(sorted(size for size in shape if size > 1))


def written(text: str, *shape: int) -> int:
    """Return how many arrays of a shape, or transposed, a program writes to memory: outside of fusions."""
    return sum(
        each.times
        for each in hlo.executions(text)
        if not each.fused
        and each.instruction.kind not in SMALL
        and any(
            sizes(dimensions(part)) == sizes(shape) for part in re.findall(r"\w+\[[\d,]*\]", each.instruction.shape)
        )
    )


def loops(text: str) -> list[int | None]:
    """Return the iterations of every loop, in ascending order; None, which comes last, for a loop of unknown length."""
    bodies, _ = hlo.computations(text)
    trips = [hlo.trip_count(each, bodies) for body in bodies.values() for each in body if each.kind == "while"]
    return sorted(trips, key=lambda count: (count is None, count or 0))


def iteration(text: str) -> str:
    """Return the program whose entry is the body of the only loop of unknown length."""
    bodies, _ = hlo.computations(text)
    unknown = [each for body in bodies.values() for each in body if hlo.trip_count(each, bodies) is None]
    (name,) = (name for each in unknown for name in re.findall(r"body=%?([\w.\-]+)", each.rest))
    return text.replace("\nENTRY ", "\n").replace(f"\n%{name} ", f"\nENTRY %{name} ")
