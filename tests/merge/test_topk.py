"""Exact selection: counts, ties by position, over one tensor and over several; and the random choice by place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsee_jax.errors import InputError
from merge import noise, topk
from merge.leaf import Whole, fold_all, positions

SHAPES = [(3, 4), (5,), (1, 1)]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)


def leaves(values):
    """Three tensors of two models, filled with ``values`` one after the other."""
    found, start = [], 0
    for number, shape in enumerate(SHAPES):
        size = int(np.prod(shape))
        one = np.float32(values[start : start + size]).reshape(shape)
        found.append(Whole(f"t{number}", np.zeros(shape, np.float32), (one, one[::-1])))
        start += size
    return found


def kept(cuts, parts):
    return [
        np.concatenate(
            [
                np.asarray(cut.kept(model, jnp.abs(part.models[model]), positions(part.shape))).ravel()
                for cut, part in zip(cuts, parts, strict=True)
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
def test_keeps_exactly_as_many_and_ties_go_by_position(values, first, second):
    """Against a stable sort of the whole model flattened, with heavy ties, zeros, tiny and huge values."""
    parts = leaves(values)
    masks = kept(topk.largest(parts, topk.magnitudes, [first, second]), parts)
    for model, (count, found) in enumerate(zip((first, second), masks, strict=True)):
        flat = np.concatenate([part.models[model].ravel() for part in parts])
        order = np.argsort(-np.abs(flat), kind="stable")
        assert found.sum() == count
        np.testing.assert_array_equal(np.flatnonzero(found), np.sort(order[:count]))


def test_every_tie_keeps_all_equal_to_the_smallest_kept():
    parts = leaves([1, 2, 2, 2, 0, 3] + [0.5] * (SIZE - 6))
    (first, second) = kept(topk.largest(parts, topk.magnitudes, [2, 1], every_tie=True), parts)
    assert [first.sum(), second.sum()] == [4, 1]
    everything = kept(topk.largest(parts, topk.magnitudes, [SIZE, 0], every_tie=True), parts)
    assert [everything[0].mean(), everything[1].mean()] == [1, 0]


def test_counts_may_be_traced():
    parts = leaves(np.arange(SIZE))
    for count in (0, 3, SIZE):
        cuts = jax.jit(lambda n: topk.largest(parts, topk.magnitudes, [n, n]))(count)
        assert [one.sum() for one in kept(cuts, parts)] == [count] * 2


def test_too_many_elements_are_refused():
    huge = Whole("huge", None, (jax.ShapeDtypeStruct((1 << 17, 1 << 16), jnp.float32),))
    with pytest.raises(InputError, match="merge from files"):
        topk.largest([huge], topk.magnitudes, [1])


def test_fold_all_keeps_the_order():
    found = fold_all(leaves(np.arange(SIZE)), total)
    assert [float(one) for one in found] == [66.0, 70.0, 17.0]


def total(tile):
    return jnp.sum(tile.models[0])


def test_positions_count_in_row_major_order_from_the_start():
    np.testing.assert_array_equal(positions((2, 3), 5), [[5, 6, 7], [8, 9, 10]])
    np.testing.assert_array_equal(positions((2,), np.uint32(0xFFFFFFFF)), np.uint32([0xFFFFFFFF, 0]))


def test_random_numbers_are_uniform_and_independent():
    """Moments, correlation over lags and between models, and equal shares of each of the highest four bits."""
    where = positions((1 << 18,))
    first, second = (np.asarray(noise.uniform(noise.words(0, "t", model), where), np.float64) for model in (0, 1))
    assert first.min() >= 0
    assert first.max() < 1
    spread = 1 / np.sqrt(12 * first.size)
    assert abs(first.mean() - 0.5) < 4 * spread
    assert abs(first.var() - 1 / 12) < 1e-3
    for lag in (1, 2, 64, 768, 1024):
        assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < 4 / np.sqrt(first.size)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(first.size)
    shares = np.bincount((first * 16).astype(int), minlength=16)
    assert ((shares - first.size / 16) ** 2 / (first.size / 16)).sum() < 45  # chi square, 15 degrees


def test_key_words_tell_seed_tensor_and_model_apart():
    words = {tuple(noise.words(s, n, m).tolist()) for s in (0, 1) for n in ("a", "b") for m in (0, 1)}
    assert len(words) == 8
    np.testing.assert_array_equal(noise.words(0, "a", 0), noise.words(0, "a", 0))
