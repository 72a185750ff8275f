"""The difference of two checkpoints, computed tile by tile: no checkpoint and no tensor is in memory as a whole."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt import differences
from dsee_jax.ckpt.differences import Difference
from dsee_jax.errors import InputError
from dsee_jax.runtime import console
from merge import units
from merge.inputs.lazy import Lazy
from merge.inputs.sources import Source

TILE = 2**20
"""Elements read at once from each checkpoint."""


class Row(NamedTuple):
    """The difference of one group of tensors in two checkpoints a and b."""

    unit: str
    size: int  # elements
    change: float  # norm of b - a over the norm of a; inf where a is 0 and b is not
    largest: float  # max |b - a|
    cosine: float  # of the angle between a and b, in [-1, 1]; nan where either is 0
    equal: float  # the fraction of elements that are exactly equal, in [0, 1]


class Comparison(NamedTuple):
    """The rows of a comparison, and the tensors that are not in both checkpoints in one shape."""

    rows: list[Row]
    total: Row  # over all rows
    only_a: list[str]  # names
    only_b: list[str]
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape in a, shape in b


def compare(a: Source, b: Source, *, unit: str = "tensor") -> Comparison:
    """Return the change from ``a`` to ``b``, one row per group: layers by number, tensors in the order of ``a``.

    Names match with and without a model's prefix (``model.``). Sums are float64 over tiles of `TILE` elements; tensors of
    different types are compared by value. NaN equals nothing.

    Args:
      a: one checkpoint.
      b: the other; changes are relative to ``a``.
      unit: as in `units.of`; tensors in no group share the last row, `differences.OTHER`.

    Raises:
      InputError: no tensor has the same name and shape in both checkpoints, or ``unit`` is invalid.
    """
    matches = differences.matches(a.tensors, b.tensors)
    reshaped = {name for name, *_ in matches.reshaped}
    common = [name for name in matches.names if name not in reshaped]
    if not common:
        raise InputError(
            f"{a.folder} and {b.folder} have no tensor of one name and shape: expected two checkpoints of one model"
        )
    groups = units.of(common, unit)
    changes = {name: differences.total(_tiles(a.tensors[name], b.tensors[matches.names[name]])) for name in common}
    sums = differences.grouped(changes, groups)
    rows = [_row(group, each) for group, each in sums.items()]
    return Comparison(
        rows, _row("all", differences.total(sums.values())), matches.only_a, matches.only_b, matches.reshaped
    )


def _tiles(a: Lazy, b: Lazy) -> Iterator[Difference]:
    size = prod(a.shape)
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        yield differences.difference(*(np.asarray(side.read(start, stop)).astype(np.float64) for side in (a, b)))


def _row(unit: str, sums: Difference) -> Row:
    return Row(unit, sums.size, sums.relative, sums.largest, sums.cosine, sums.share(sums.equal))


def figures(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as an object of JSON."""
    return comparison._asdict() | {
        "rows": [row._asdict() for row in comparison.rows],
        "total": comparison.total._asdict(),
        "reshaped": [{"name": name, "a": a, "b": b} for name, a, b in comparison.reshaped],
    }


def table(comparison: Comparison, *, most: int = 10) -> str:
    """Return a comparison as text: one line per row, a total, and up to ``most`` names of unmatched tensors."""
    rows = [
        [
            row.unit,
            f"{row.size:,}",
            _percent(row.change),
            f"{row.largest:.3g}",
            f"{row.cosine:.6f}",
            _percent(row.equal),
        ]
        for row in (*comparison.rows, comparison.total)
    ]
    header = ["unit", "elements", "relative change", "largest change", "cosine", "exactly equal"]
    lines = [aligned([header, *rows])]
    for title, names in (
        ("only in A", comparison.only_a),
        ("only in B", comparison.only_b),
        ("shapes differ", [f"{name} {theirs} and {ours}" for name, theirs, ours in comparison.reshaped]),
    ):
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            lines.append(console.plain(f"{title} ({len(names)}): {', '.join(names[:most])}{more}"))
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, each row on a line; the first column is aligned to the left, the others to the right."""
    rows = [[console.plain(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _percent(share: float) -> str:
    """Return a percentage in which shares near 1 or 0 do not round to 100% or 0%."""
    text = f"{share:.2%}"
    return {"100.00%": "<100%", "0.00%": ">0%"}.get(text, text) if share not in (0, 1) else text
