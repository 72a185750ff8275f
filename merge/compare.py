"""The difference of two checkpoints, computed tile by tile: no checkpoint and no tensor is loaded whole."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsee_jax.ckpt import tensors
from dsee_jax.errors import InputError
from merge import units
from merge.inputs.lazy import Lazy
from merge.inputs.sources import Source

TILE = 2**20
"""Elements read at once from each checkpoint."""
OTHER = "other"
"""The row of tensors that are in no group."""


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


class _Sums(NamedTuple):
    """Sums over tiles and tensors."""

    size: int = 0
    change: float = 0.0  # sum of (b - a)^2
    a: float = 0.0  # sum of a^2
    b: float = 0.0
    product: float = 0.0  # sum of a b
    equal: int = 0
    largest: float = 0.0

    def plus(self, other: "_Sums") -> "_Sums":
        sums = _Sums._make(x + y for x, y in zip(self, other, strict=True))
        # np.maximum propagates NaN; max() may not.
        return sums._replace(largest=float(np.maximum(self.largest, other.largest)))

    def row(self, unit: str) -> Row:
        with np.errstate(divide="ignore", invalid="ignore"):
            change = 0.0 if self.change == 0 else float(np.sqrt(np.divide(self.change, self.a)))
            cosine = float(np.divide(self.product, np.sqrt(self.a) * np.sqrt(self.b)))
        return Row(unit, self.size, change, self.largest, float(np.clip(cosine, -1, 1)), self.equal / max(self.size, 1))


def compare(a: Source, b: Source, *, unit: str = "tensor") -> Comparison:
    """Return the change from ``a`` to ``b``, one row per group: layers by number, tensors in the order of ``a``.

    Names match with and without a model's prefix (``model.``). Sums are float64 over tiles of `TILE` elements; tensors of
    different types are compared by value. NaN equals nothing.

    Args:
      a: one checkpoint.
      b: the other; changes are relative to ``a``.
      unit: as in `units.of`; tensors in no group share the last row, ``other``.

    Raises:
      InputError: no tensor has the same name and shape in both checkpoints, or ``unit`` is invalid.
    """
    pairs = tensors.paired(a.tensors, b.tensors)
    shapes = [(name, a.tensors[name].shape, b.tensors[theirs].shape) for name, theirs in pairs.items()]
    reshaped = [entry for entry in shapes if entry[1] != entry[2]]
    alike = [name for name, ours, theirs in shapes if ours == theirs]
    if not alike:
        raise InputError(
            f"{a.folder} and {b.folder} have no tensor of one name and shape: expected two checkpoints of one model"
        )
    where = units.of(alike, unit)
    sums: dict[str, _Sums] = {}
    for name in alike:
        key = where[name] or OTHER
        sums[key] = sums.get(key, _Sums()).plus(_tensor(a.tensors[name], b.tensors[pairs[name]]))
    order = sorted(sums, key=lambda key: (key == OTHER, int(key) if key.isdigit() else 0))
    whole = _Sums()
    for part in sums.values():
        whole = whole.plus(part)
    only_a = [name for name in a.tensors if name not in pairs]
    only_b = [name for name in b.tensors if name not in set(pairs.values())]
    return Comparison([sums[key].row(key) for key in order], whole.row("all"), only_a, only_b, reshaped)


def _tensor(a: Lazy, b: Lazy) -> _Sums:
    size, total = int(np.prod(a.shape)), _Sums()
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        x, y = (np.asarray(side.read(start, stop)).astype(np.float64).ravel() for side in (a, b))
        same = int(np.count_nonzero(x == y))
        # inf - inf is NaN, which the row shows.
        with np.errstate(invalid="ignore"):
            d = y - x
        change, squares, others, product = (float(np.vdot(p, q)) for p, q in ((d, d), (x, x), (y, y), (x, y)))
        largest = float(np.max(np.abs(d)))
        total = total.plus(_Sums(stop - start, change, squares, others, product, same, largest))
    return total


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
            lines.append(f"{title} ({len(names)}): {', '.join(names[:most])}{more}")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text; the first column is aligned to the left, the others to the right."""
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
