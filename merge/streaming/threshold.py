"""The exact k-th largest of numbers that are read in chunks, and which elements equal to it are selected.

Non-negative floats are ordered like their bits, so the search counts integers. A sample brackets the answer. One pass then
counts the elements above the bracket and collects the elements inside. If the bracket misses the answer, or holds too many
elements to collect, further passes count by histogram. The result is exact in every case, in bounded memory.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from math import sqrt
from typing import Any, NamedTuple, TypeAlias

import numpy as np

EVERY = 0xFFFFFFFF
"""The end of a tensor whose equal elements are all selected."""

INFINITY = 0x7F800000
"""The bits of infinity in float32."""

LIMIT = 1 << 21
"""The maximum number of elements collected per tensor: 16 MB."""

BINS = 1 << 16
"""The maximum number of bins of a histogram."""

Pass: TypeAlias = Callable[[], tuple[Callable[[int, np.ndarray], None], Callable[[], Any]]]
"""Starts a pass over one tensor. Returns two functions: the first takes each chunk in turn, as the position of its first
element and the int32 bits of non-negative float32; the second then returns the pass's result."""


class Threshold(NamedTuple):
    """The smallest selected value, and for each tensor the position before which equal elements are selected."""

    value: float
    ends: list[int]  # EVERY: at any position


def search(
    sizes: Sequence[int], count: int, sample: np.ndarray | None = None
) -> Generator[Pass, Sequence[Any], Threshold]:
    """Return the threshold of exactly the ``count`` largest elements; among equal elements the first positions are selected.

    The generator yields a `Pass` over every tensor and is sent the results, so that several searches can share one reading.

    Args:
      sizes: elements of each tensor.
      count: the number of elements to select from all tensors together.
      sample: int32 bits of some of the elements, to start with a narrow bracket.
    """
    total = sum(sizes)
    if count <= 0 or count >= total:
        return Threshold(float("inf") if count <= 0 else -1.0, [0] * len(sizes))
    low, high, inside = (0, INFINITY, total) if sample is None else _bracket(sample, total, count)
    while True:
        if inside <= LIMIT:
            parts = yield partial(_collect, low, high)
            if all(part is not None for part in parts):
                above = sum(part[0] for part in parts)
                collected = sum(part[1].size for part in parts)
                if above < count <= above + collected:
                    return _select(parts, count - above)
                low, high, inside = (high + 1, INFINITY, total) if count <= above else (0, low - 1, total)
                continue
        shift = max((high - low).bit_length() - (BINS.bit_length() - 1), 0)
        parts = yield partial(_histogram, low, high, shift)
        above = sum(part[0] for part in parts)
        bins = np.sum([part[1] for part in parts], axis=0)
        if not above < count <= above + bins.sum():
            low, high, inside = (high + 1, INFINITY, total) if count <= above else (0, low - 1, total)
            continue
        at_least = above + np.cumsum(bins[::-1])[::-1]
        place = int(np.flatnonzero(at_least >= count)[-1])
        low, inside = low + (place << shift), int(bins[place])
        high = min(high, low + (1 << shift) - 1)
        if low == high:
            spare = count - int(at_least[place] - bins[place])
            return (yield from _ends(low, spare, [part[1][place] for part in parts]))


def run_all(
    searches: Sequence[Generator[Pass, Sequence[Any], Threshold]],
    read_pass: Callable[[Mapping[int, Pass]], Sequence[Mapping[int, Any]]],
) -> list[Threshold]:
    """Return the results of the searches, which share each reading of the tensors.

    ``read_pass({search number: pass})`` reads the tensors once and returns ``{search number: result}`` for each tensor.
    """
    results: dict[int, Threshold] = {}
    passes: dict[int, Pass] = {}
    parts: Sequence[Mapping[int, Any]] | None = None
    while len(results) < len(searches):
        for number, search in enumerate(searches):
            if number not in results:
                try:
                    passes[number] = next(search) if parts is None else search.send([part[number] for part in parts])
                except StopIteration as done:
                    results[number] = done.value
                    passes.pop(number, None)
        if passes:
            parts = read_pass(passes)
    return [results[number] for number in range(len(searches))]


def _bracket(sample: np.ndarray, total: int, count: int) -> tuple[int, int, int]:
    """Return the bits of a bracket that most likely holds the answer, and the estimated number of elements inside."""
    size = sample.size
    ordered = np.sort(sample)
    middle, share = size * (1 - count / total), count / total
    # The sample consists of blocks of similar elements: it needs a wider margin than independent draws.
    margin = 6 * sqrt(size * share * (1 - share)) + 16
    first, last = int(middle - margin), int(middle + margin)
    low = int(ordered[first]) if first > 0 else 0
    high = int(ordered[last]) if last < size else INFINITY
    within = np.searchsorted(ordered, high, "right") - np.searchsorted(ordered, low, "left")
    return low, high, int(total * within / size)


def _within(low: int, high: int, chunk: np.ndarray) -> np.ndarray:
    # One comparison instead of two: below ``low`` the difference wraps to a large number.
    return (chunk - np.int32(low)).view(np.uint32) <= np.uint32(high - low)


def _masked(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    # Indexing by positions is three times as fast as by the mask.
    return values[np.flatnonzero(mask)]


def _collect(low: int, high: int) -> tuple[Callable[[int, np.ndarray], None], Callable[[], Any]]:
    """Count the elements above ``high``, and collect bits and positions from ``low`` up; None for more than `LIMIT`."""
    above, collected, bits, positions = 0, 0, [], []

    def take(start: int, chunk: np.ndarray) -> None:
        nonlocal above, collected
        above += int(np.count_nonzero(chunk > high))
        if collected <= LIMIT:
            inside = np.flatnonzero(_within(low, high, chunk))
            bits.append(chunk[inside])
            positions.append((inside + start).astype(np.uint32))  # all positions are below `EVERY`
            collected += inside.size

    def finish() -> Any:
        return (above, _joined(bits), _joined(positions)) if collected <= LIMIT else None

    return take, finish


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    """Return the concatenated pieces, and free them."""
    joined = np.concatenate(pieces)
    pieces.clear()
    return joined


def _select(parts: Sequence[tuple[int, np.ndarray, np.ndarray]], count: int) -> Threshold:
    """Return the threshold of the ``count`` largest of the collected elements."""
    collected = parts[0][1] if len(parts) == 1 else np.concatenate([bits for _, bits, _ in parts])
    answer = _kth(collected, count)
    spare, ends = count - int(np.count_nonzero(collected > answer)), []
    for _, bits, positions in parts:
        equal = np.flatnonzero(bits == answer)
        ends.append(0 if spare <= 0 else EVERY if equal.size <= spare else int(positions[equal[spare - 1]]) + 1)
        spare -= equal.size
    return Threshold(_value(answer), ends)


def _kth(values: np.ndarray, count: int) -> int:
    """Return the ``count``-th largest integer by counting, whose time does not depend on the number of equal elements."""
    while True:
        low, high = int(values.min()), int(values.max())
        if low == high:
            return low
        shift = max((high - low).bit_length() - (BINS.bit_length() - 1), 0)
        bins = (values - low) >> shift
        at_least = np.cumsum(np.bincount(bins)[::-1])[::-1]
        place = int(np.flatnonzero(at_least >= count)[-1])
        if not shift:
            return low + place
        count -= int(at_least[place + 1]) if place + 1 < at_least.size else 0
        values = _masked(bins == place, values)


def _histogram(low: int, high: int, shift: int) -> tuple[Callable[[int, np.ndarray], None], Callable[[], Any]]:
    """Count the elements above ``high``, and those from ``low`` to ``high`` by ``(bits - low) >> shift``."""
    above, bins = 0, np.zeros(((high - low) >> shift) + 1, np.int64)

    def take(start: int, chunk: np.ndarray) -> None:
        nonlocal above
        inside = _masked(_within(low, high, chunk), chunk)
        above += int(np.count_nonzero(chunk > high))
        bins[:] += np.bincount((inside - low) >> shift, minlength=bins.size)

    return take, lambda: (above, bins)


def _ends(answer: int, spare: int, equals: Sequence[int]) -> Generator[Pass, Sequence[int], Threshold]:
    """Find the ends; reads again only if a tensor has more elements equal to ``answer`` than are selected."""
    ends: list[int] = []
    for number, equal in enumerate(equals):
        if 0 < spare < equal:
            parts = yield partial(_position, answer, spare)
            ends.append(parts[number])
        else:
            ends.append(0 if spare <= 0 else EVERY)
        spare -= int(equal)
    return Threshold(_value(answer), ends)


def _position(answer: int, spare: int) -> tuple[Callable[[int, np.ndarray], None], Callable[[], int]]:
    """Find the position after the ``spare``-th element equal to ``answer``; 0 if there are fewer."""
    left, end = spare, 0

    def take(start: int, chunk: np.ndarray) -> None:
        nonlocal left, end
        if left > 0:
            equal = np.flatnonzero(chunk == answer)
            if equal.size >= left:
                end = start + int(equal[left - 1]) + 1
            left -= equal.size

    return take, lambda: end


def _value(bits: int) -> float:
    return float(np.array(bits, np.int32).view(np.float32))
