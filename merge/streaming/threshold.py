"""The exact k-th largest of numbers that are read in stretches, and which of those equal to it are kept.

Non-negative floats are ordered as their bits are, so all is counting of integers. A sample brackets the answer; one pass then
counts what lies above the bracket and keeps what lies inside it. A bracket that missed, or that holds too much to keep, is
mended by passes that only count. Exact in every case, in bounded memory.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from math import sqrt
from typing import Any, NamedTuple, TypeAlias

import numpy as np

EVERY = 0xFFFFFFFF

INFINITY = 0x7F800000
"""The bits of infinity in float32."""

LIMIT = 1 << 21
"""Elements of a tensor that are kept at once to look for the answer among them: 16 MB."""

BINS = 1 << 16

Pass: TypeAlias = Callable[[], tuple[Callable[[int, np.ndarray], None], Callable[[], Any]]]
"""Begins a look at one tensor: returns what takes each stretch of it in turn, the position of its first element and its int32
bits of non-negative float32, and what then returns what was found."""


class Found(NamedTuple):
    """The smallest value kept, and for each tensor the position before which those equal to it are kept."""

    threshold: float
    ends: list[int]  # EVERY: wherever they are


def search(sizes: Sequence[int], count: int, sample: np.ndarray | None = None) -> Generator[Pass, Sequence[Any], Found]:
    """Return what keeps exactly the ``count`` largest; those equal to the smallest kept go in order of position.

    Yields a `Pass` over every tensor, and is sent what each found. So that several searches can share one reading.

    Args:
      sizes: elements of each tensor.
      count: how many to keep of all tensors together.
      sample: int32 bits of some of the elements, to begin nearer.
    """
    total = sum(sizes)
    if count <= 0 or count >= total:
        return Found(float("inf") if count <= 0 else -1.0, [0] * len(sizes))
    low, high, inside = (0, INFINITY, total) if sample is None else _bracket(sample, total, count)
    while True:
        if inside <= LIMIT:
            parts = yield partial(_collect, low, high)
            if all(part is not None for part in parts):
                above = sum(part[0] for part in parts)
                held = sum(part[1].size for part in parts)
                if above < count <= above + held:
                    return _among(parts, count - above)
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
            return (yield from _walk(low, spare, [part[1][place] for part in parts]))


def together(
    searches: Sequence[Generator[Pass, Sequence[Any], Found]],
    look: Callable[[Mapping[int, Pass]], Sequence[Mapping[int, Any]]],
) -> list[Found]:
    """Return what the searches find, all of which get their passes from each reading.

    ``look({number of the search: pass})`` returns for each tensor ``{number: result}``.
    """
    found: dict[int, Found] = {}
    passes: dict[int, Pass] = {}
    parts: Sequence[Mapping[int, Any]] | None = None
    while len(found) < len(searches):
        for number, one in enumerate(searches):
            if number not in found:
                try:
                    passes[number] = next(one) if parts is None else one.send([part[number] for part in parts])
                except StopIteration as done:
                    found[number] = done.value
                    passes.pop(number, None)
        if passes:
            parts = look(passes)
    return [found[number] for number in range(len(searches))]


def _bracket(sample: np.ndarray, total: int, count: int) -> tuple[int, int, int]:
    """Return bits that the answer lies between, most likely, and about how many elements do."""
    size = sample.size
    ordered = np.sort(sample)
    middle, share = size * (1 - count / total), count / total
    # Samples are taken in blocks, whose elements are alike: allow for more than independent draws would need.
    margin = 6 * sqrt(size * share * (1 - share)) + 16
    first, last = int(middle - margin), int(middle + margin)
    low = int(ordered[first]) if first > 0 else 0
    high = int(ordered[last]) if last < size else INFINITY
    within = np.searchsorted(ordered, high, "right") - np.searchsorted(ordered, low, "left")
    return low, high, int(total * within / size)


def _within(low: int, high: int, stretch: np.ndarray) -> np.ndarray:
    # One comparison for two: below ``low`` the difference wraps to something large.
    return (stretch - np.int32(low)).view(np.uint32) <= np.uint32(high - low)


def _where(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    # By their positions: three times as fast as by the mask itself.
    return values[np.flatnonzero(mask)]


def _collect(low: int, high: int) -> tuple[Callable[[int, np.ndarray], None], Callable[[], Any]]:
    """Find how many lie above ``high``, and bits and positions of those from ``low``; None when there are too many."""
    above, held, bits, places = 0, 0, [], []

    def take(start: int, stretch: np.ndarray) -> None:
        nonlocal above, held
        above += int(np.count_nonzero(stretch > high))
        if held <= LIMIT:
            found = np.flatnonzero(_within(low, high, stretch))
            bits.append(stretch[found])
            places.append((found + start).astype(np.uint32))  # below `EVERY`, as all positions are
            held += found.size

    def finish() -> Any:
        return (above, _joined(bits), _joined(places)) if held <= LIMIT else None

    return take, finish


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    """Return the pieces as one, and let go of them."""
    found = np.concatenate(pieces)
    pieces.clear()
    return found


def _among(parts: Sequence[tuple[int, np.ndarray, np.ndarray]], count: int) -> Found:
    """Return the answer from the collected elements, of which the ``count`` largest are kept."""
    every = parts[0][1] if len(parts) == 1 else np.concatenate([bits for _, bits, _ in parts])
    answer = _kth(every, count)
    spare, ends = count - int(np.count_nonzero(every > answer)), []
    for _, bits, places in parts:
        equal = np.flatnonzero(bits == answer)
        ends.append(0 if spare <= 0 else EVERY if equal.size <= spare else int(places[equal[spare - 1]]) + 1)
        spare -= equal.size
    return Found(_value(answer), ends)


def _kth(values: np.ndarray, count: int) -> int:
    """Return the ``count``-th largest of integers; by counting, which does not mind that many are equal."""
    while True:
        low, high = int(values.min()), int(values.max())
        if low == high:
            return low
        shift = max((high - low).bit_length() - (BINS.bit_length() - 1), 0)
        places = (values - low) >> shift
        at_least = np.cumsum(np.bincount(places)[::-1])[::-1]
        place = int(np.flatnonzero(at_least >= count)[-1])
        if not shift:
            return low + place
        count -= int(at_least[place + 1]) if place + 1 < at_least.size else 0
        values = _where(places == place, values)


def _histogram(low: int, high: int, shift: int) -> tuple[Callable[[int, np.ndarray], None], Callable[[], Any]]:
    """Find how many lie above ``high``, and the counts by ``(bits - low) >> shift`` of those between."""
    above, bins = 0, np.zeros(((high - low) >> shift) + 1, np.int64)

    def take(start: int, stretch: np.ndarray) -> None:
        nonlocal above
        inside = _where(_within(low, high, stretch), stretch)
        above += int(np.count_nonzero(stretch > high))
        bins[:] += np.bincount((inside - low) >> shift, minlength=bins.size)

    return take, lambda: (above, bins)


def _walk(answer: int, spare: int, equals: Sequence[int]) -> Generator[Pass, Sequence[int], Found]:
    """Find the ends, reading again only where keeping those equal to ``answer`` stops in the middle of a tensor."""
    ends: list[int] = []
    for number, equal in enumerate(equals):
        if 0 < spare < equal:
            parts = yield partial(_position, answer, spare)
            ends.append(parts[number])
        else:
            ends.append(0 if spare <= 0 else EVERY)
        spare -= int(equal)
    return Found(_value(answer), ends)


def _position(answer: int, spare: int) -> tuple[Callable[[int, np.ndarray], None], Callable[[], int]]:
    """Find one more than the position of the ``spare``-th element equal to ``answer``; 0: there are fewer."""
    left, end = spare, 0

    def take(start: int, stretch: np.ndarray) -> None:
        nonlocal left, end
        if left > 0:
            equal = np.flatnonzero(stretch == answer)
            if equal.size >= left:
                end = start + int(equal[left - 1]) + 1
            left -= equal.size

    return take, lambda: end


def _value(bits: int) -> float:
    return float(np.array(bits, np.int32).view(np.float32))
