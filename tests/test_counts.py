"""Counts in two limbs: equal to Python's whole numbers far beyond an int32."""

import fractions

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax import counts
from dsee_jax.errors import InputError

NUMBERS = st.integers(0, counts.MOST - 1) | st.sampled_from([0, 255, 256, 2**31 - 1, 2**31, 2**32, 2**40 - 1])


@hypothesis.given(NUMBERS, NUMBERS)
def test_arithmetic_equals_that_of_whole_numbers(a, b):
    small, large = counts.of(min(a, b)), counts.of(max(a, b))
    assert counts.number(large) == max(a, b)
    assert counts.number(counts.subtract(large, small)) == max(a, b) - min(a, b)
    assert counts.number(counts.add(counts.of(a // 2), counts.of(b // 2))) == a // 2 + b // 2
    assert bool(counts.at_least(counts.of(a), counts.of(b))) == (a >= b)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 70000)])
def test_total_carries(shape):
    parts = np.random.default_rng(0).integers(2**31 - 1000, 2**31, shape).astype(np.int32)
    parts = parts if parts.size < 500 else parts >> 9
    assert counts.number(jax.jit(counts.total)(parts)) == int(parts.sum(dtype=np.int64))


@pytest.mark.parametrize("most", [4, 12, 24, 25])
def test_true_counts_in_parts(most):
    """As a mask with more entries than an int32 counts: by layer, by row, or entry by entry."""
    mask = jnp.arange(24).reshape(2, 3, 4) % 5 == 0
    parts = [counts.parts(each, most) for each in (mask, ~mask, mask[:0])]
    assert counts.number(counts.total(*parts)) == 24
    assert counts.number(counts.total(parts[0])) == counts.number(counts.true(mask)) == 5


@hypothesis.given(st.floats(0, 1, exclude_max=True, width=32), NUMBERS)
@hypothesis.example(0.5, 2**40 - 1)
@hypothesis.example(0.5, 3)
@hypothesis.example(0.5, 5)
@hypothesis.example(float(np.nextafter(np.float32(1), np.float32(0))), 2**40 - 1)
def test_share_is_rounded_as_python_rounds(fraction, entries):
    fraction = np.floor(fraction * 2**32) / 2**32
    exact = fractions.Fraction(fraction) * entries
    assert counts.number(counts.share(np.float32(fraction), entries)) == round(exact)


def test_more_entries_than_a_count_holds_are_refused():
    counts.check((2**20, 2**10), (2**20, 2**19))
    for shapes in ([(2**20, 2**20)], [(2**20, 2**19)] * 2, [(2**24, 2**8)]):
        with pytest.raises(InputError, match="too many to count"):
            counts.check(*shapes)
