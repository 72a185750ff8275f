"""The protocol of timed steps: what comes before the clock, and that both sides have the same batches."""

import numpy as np
import pytest

from benchmarks import timed_steps


def test_first_batch_of_each_length_has_a_step_before_the_clock():
    """Otherwise compiling is timed on one side."""
    steps = []
    assert timed_steps.median_seconds(steps.append, ["a", "b", "c"], [3, 5, 3]) > 0
    assert steps == ["a", "b", "a", "b", "c"]


def test_texts_are_written_once_before_the_clock():
    calls = []
    assert timed_steps.tokens_per_second(lambda: calls.append(1), 12) > 0
    assert len(calls) == 3


def test_steps_after_the_last_batch_begin_again():
    assert timed_steps.numbers(5, 2) == [0, 1, 0, 1, 0]
    assert timed_steps.numbers(2, 5) == [0, 1]


def rows(name="", value=1, dtype=np.int32):
    """Return a batch of which one array has other values."""
    return {each: np.full((1, 3), value if each == name else 1, dtype) for each in timed_steps.ARRAYS}


@pytest.mark.parametrize(
    ("batches", "prompts"),
    [
        *(([rows(name, 2)], [[4]]) for name in timed_steps.ARRAYS),
        ([rows(dtype=np.int64)], [[4]]),
        ([rows(), rows()], [[4]]),
        ([rows()], [[5]]),
    ],
)
def test_digest_distinguishes_batches_and_prompts(batches, prompts):
    assert timed_steps.digest(batches, prompts) != timed_steps.digest([rows()], [[4]])
    assert timed_steps.digest([rows()], [[np.int64(4)]]) == timed_steps.digest([rows()], [[4]])
