"""The difference of two checkpoints a and b: matched tensors, and sums over elements that add up over tiles and tensors."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt import spelling

OTHER = "other"
"""The group of the tensors that are in no other group."""


class Matches(NamedTuple):
    """The tensors of two checkpoints by name, in the order of the checkpoints."""

    names: dict[str, str]  # of b by those of a
    only_a: list[str]
    only_b: list[str]
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name in a, shape in a, shape in b


class Difference(NamedTuple):
    """Sums over the elements of a tensor, a tile of a tensor, or several tensors."""

    size: int = 0  # elements
    change: float = 0.0  # sum of (b - a)^2
    a: float = 0.0  # sum of a^2
    b: float = 0.0  # sum of b^2
    product: float = 0.0  # sum of a b
    equal: int = 0  # elements with a = b
    zeros: int = 0  # elements with b = 0
    largest: float = 0.0  # max |b - a|

    @property
    def relative(self) -> float:
        """Norm of b - a over the norm of a: 0 if both are 0, infinite if only a is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return 0.0 if self.change == 0 else float(np.sqrt(np.divide(self.change, self.a)))

    @property
    def cosine(self) -> float:
        """Cosine of the angle between a and b, in [-1, 1]; NaN if either is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.clip(np.divide(self.product, np.sqrt(self.a) * np.sqrt(self.b)), -1, 1))

    def share(self, count: int) -> float:
        """Return ``count`` over the number of elements, in [0, 1]."""
        return count / max(self.size, 1)


def matches(a: Mapping[str, Any], b: Mapping[str, Any]) -> Matches:
    """Return the matches of two checkpoints ``{name: tensor with a shape}``; one may spell its names otherwise."""
    names = spelling.paired(a, b)
    theirs = set(names.values())
    shapes = [(name, a[name].shape, b[other].shape) for name, other in names.items()]
    return Matches(
        names,
        [name for name in a if name not in names],
        [name for name in b if name not in theirs],
        [entry for entry in shapes if entry[1] != entry[2]],
    )


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Return the sums over two arrays of one shape and one type, float32 or float64; products and sums are float64.

    A NaN or an infinity makes the sums NaN or infinite, without a warning.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        change = b - a
        moved, of_a, of_b = (float(np.sum(np.square(each, dtype=np.float64))) for each in (change, a, b))
        product = float(np.sum(np.multiply(a, b, dtype=np.float64)))
    equal, zeros = int(np.count_nonzero(a == b)), int(np.count_nonzero(b == 0))
    return Difference(a.size, moved, of_a, of_b, product, equal, zeros, float(np.max(np.abs(change), initial=0.0)))


def total(differences: Iterable[Difference]) -> Difference:
    """Return the sums over tiles or tensors, in their order."""
    result = Difference()
    for each in differences:
        added = Difference._make(x + y for x, y in zip(result, each, strict=True))
        # np.maximum propagates NaN; max() may not.
        result = added._replace(largest=float(np.maximum(result.largest, each.largest)))
    return result


def grouped(differences: Mapping[str, Difference], groups: Mapping[str, str | None]) -> dict[str, Difference]:
    """Return the sums of each group of tensors: names first, then numbers in ascending order, `OTHER` last.

    Args:
      differences: by the names of the tensors.
      groups: the group of each tensor; None: `OTHER`.
    """
    members: dict[str, list[Difference]] = {}
    for name, each in differences.items():
        members.setdefault(groups[name] or OTHER, []).append(each)
    order = sorted(members, key=lambda group: (group == OTHER, int(group) if group.isdigit() else 0))
    return {group: total(members[group]) for group in order}
