"""Exact selection over one tensor or several: counts, and ties by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsee_jax.errors import InputError
from merge import topk
from merge.leaf import Whole, positions

SHAPES = [(3, 4), (5,), (1, 1)]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)


def leaves(values):
    """Three tensors of two models: the first model holds ``values``, the second model the rows in reverse order."""
    result, start = [], 0
    for number, shape in enumerate(SHAPES):
        size = int(np.prod(shape))
        tensor = np.float32(values[start : start + size]).reshape(shape)
        result.append(Whole(f"t{number}", np.zeros(shape, np.float32), (tensor, tensor[::-1])))
        start += size
    return result


def masks(selections, parts):
    """The masks of both models, True = selected, concatenated over the tensors."""
    return [
        np.concatenate(
            [
                np.asarray(selection.mask(model, jnp.abs(part.models[model]), positions(part.shape))).ravel()
                for selection, part in zip(selections, parts, strict=True)
            ]
        )
        for model in range(2)
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-37, 3e38, 0.1]), min_size=SIZE, max_size=SIZE),
    st.integers(0, SIZE),
    st.integers(0, SIZE),
)
def test_exactly_k_elements_are_selected_and_ties_by_position(values, first, second):
    """Against a stable sort of the flattened model, with many ties, zeros, tiny and huge values."""
    parts = leaves(values)
    selected = masks(topk.largest(parts, topk.magnitudes, [first, second]), parts)
    for model, (count, mask) in enumerate(zip((first, second), selected, strict=True)):
        flat = np.concatenate([part.models[model].ravel() for part in parts])
        order = np.argsort(-np.abs(flat), kind="stable")
        assert mask.sum() == count
        np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order[:count]))


def test_every_tie_selects_all_elements_equal_to_the_smallest():
    parts = leaves([1, 2, 2, 2, 0, 3] + [0.5] * (SIZE - 6))
    (first, second) = masks(topk.largest(parts, topk.magnitudes, [2, 1], every_tie=True), parts)
    assert [first.sum(), second.sum()] == [4, 1]
    everything = masks(topk.largest(parts, topk.magnitudes, [SIZE, 0], every_tie=True), parts)
    assert [everything[0].mean(), everything[1].mean()] == [1, 0]


def test_traced_counts_are_exact():
    parts = leaves(np.arange(SIZE))
    for count in (0, 3, SIZE):
        selections = jax.jit(lambda n: topk.largest(parts, topk.magnitudes, [n, n]))(count)
        assert [mask.sum() for mask in masks(selections, parts)] == [count] * 2


def test_too_many_elements_are_refused():
    huge = Whole("huge", None, (jax.ShapeDtypeStruct((1 << 17, 1 << 16), jnp.float32),))
    with pytest.raises(InputError, match="merge from files"):
        topk.largest([huge], topk.magnitudes, [1])
