"""The timed training steps of a decoder, by one protocol for this library and for PEFT. Imports no library but NumPy.

All batches are ready before the clock starts, and each length has had a step that is not timed: compiling, and the first touch
of the memory, are of that one.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

ARRAYS = ("ids", "segments", "labels", "weights")
"""The arrays of a batch, as in `benchmarks.decoder_tokens`."""


def numbers(steps: int, total: int) -> list[int]:
    """Return the numbers of the batches of ``steps`` timed steps: the first of the run's ``total``, again after the last."""
    return [step % total for step in range(steps)]


def digest(batches: Sequence[Mapping[str, np.ndarray]], prompts: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of the arrays of the batches (`ARRAYS`) and of the ids of the prompts: both sides have the same."""
    made = hashlib.sha256(json.dumps([[int(token) for token in prompt] for prompt in prompts]).encode())
    for batch in batches:
        for name in ARRAYS:
            array = np.ascontiguousarray(batch[name])
            made.update(f"{name} {array.dtype} {array.shape}".encode())
            made.update(array.tobytes())
    return made.hexdigest()


def median_seconds(step: Callable[[Any], object], batches: Sequence[Any], lengths: Sequence[int]) -> float:
    """Return the median seconds of a step over ``batches``, in their order.

    Args:
      step: does a step on a batch, and waits until it is done.
      batches: ready for ``step``.
      lengths: of each batch; the first batch of each length has a step before that is not timed.
    """
    for length in dict.fromkeys(lengths):
        step(batches[lengths.index(length)])
    seconds = []
    for batch in batches:
        begin = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def tokens_per_second(write: Callable[[], object], tokens: int, *, calls: int = 2) -> float:
    """Return ``tokens`` over the median seconds of ``calls`` calls of ``write``, after one that is not timed."""
    return tokens / median_seconds(lambda _: write(), [None] * calls, [0] * calls)
