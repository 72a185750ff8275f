"""Exact top-k, N:M, and the selectors of coordinates."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax.deltas import supports
from dsee_jax.errors import InputError
from dsee_jax.ops import topk

TIED = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1e-40, 1.0, 2.0, np.inf, np.nan])


def stable_top_k(score: np.ndarray, k: int) -> np.ndarray:
    """Return the expected result of top_k, by a stable sort."""
    flat = score.astype(np.float32).ravel()
    # top_k counts subnormal numbers as zero, as most accelerators do.
    flat = np.where(np.abs(flat) < np.finfo(np.float32).tiny, 0, flat)
    order = sorted(range(flat.size), key=lambda i: (not np.isnan(flat[i]), flat[i] if flat[i] == flat[i] else 0, -i))
    mask = np.zeros(flat.size, bool)
    mask[order[flat.size - k :]] = True
    return mask.reshape(score.shape)


@pytest.mark.parametrize(
    ("score", "k", "kept"),
    [
        ([3.0, 1.0, 2.0, 5.0], 2, [1, 0, 0, 1]),
        ([1.0, 1.0, 1.0, 1.0], 2, [1, 1, 0, 0]),
        ([-0.0, 0.0, -0.0, -1.0], 1, [1, 0, 0, 0]),
        ([-3.0, -1.0, -2.0, -5.0], 3, [1, 1, 1, 0]),
        ([np.nan, -np.inf, np.inf, 0.0], 2, [0, 0, 1, 1]),
        ([np.nan, -np.inf, np.nan, 0.0], 3, [1, 1, 0, 1]),
        ([1.0, 2.0, 3.0, 4.0], 0, [0, 0, 0, 0]),
        ([1.0, 2.0, 3.0, 4.0], 4, [1, 1, 1, 1]),
    ],
)
def test_top_k_literals(score, k, kept):
    assert topk.top_k(jnp.array(score), k).astype(int).tolist() == kept


@hypothesis.given(hnp.arrays(np.float32, (3, 5), elements=TIED), st.integers(0, 15))
@hypothesis.settings(max_examples=200, deadline=None)
def test_top_k_is_exact_under_massive_ties(score, k):
    mask = topk.top_k(score, k)
    assert mask.sum() == k
    np.testing.assert_array_equal(mask, stable_top_k(score, k))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_top_k_takes_a_traced_count_under_vmap(dtype):
    score = jax.random.normal(jax.random.key(0), (4, 6, 7)).astype(dtype)
    counts = jnp.array([0, 1, 20, 42])
    masks = jax.jit(jax.vmap(topk.top_k))(score, counts)
    assert masks.shape == score.shape
    assert masks.dtype == bool
    assert masks.sum((1, 2)).tolist() == counts.tolist()


def test_n_m_literals():
    """2:4, 1:4 and 1:2 along the inputs (axis 0), by hand; ties keep the lower input."""
    score = jnp.array([[1.0, 4.0, 7.0], [2.0, 3.0, 7.0], [3.0, 2.0, 7.0], [4.0, 1.0, 7.0]])
    assert topk.n_m(score, 2, 4).astype(int).tolist() == [[0, 1, 1], [0, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert topk.n_m(score, 1, 4).astype(int).tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert topk.n_m(score[:, :1], 1, 2).astype(int).tolist() == [[0], [1], [0], [1]]


@hypothesis.given(hnp.arrays(np.float32, (2, 8, 3), elements=TIED), st.sampled_from([(0, 4), (1, 4), (2, 4), (4, 8)]))
@hypothesis.settings(max_examples=50, deadline=None)
def test_n_m_keeps_exactly_n_and_the_best(score, n_m):
    n, m = n_m
    mask = topk.n_m(score, n, m)
    groups = mask.reshape(2, 8 // m, m, 3)
    assert (groups.sum(2) == n).all()
    one = np.array([stable_top_k(score[0, :m, c], n) for c in range(3)]).T
    np.testing.assert_array_equal(mask[0, :m], one)


def test_n_m_refuses_inputs_that_m_does_not_divide():
    with pytest.raises(InputError, match="found 6"):
        topk.n_m(jnp.ones((6, 2)), 2, 4)
    with pytest.raises(InputError, match="5:4"):
        topk.n_m(jnp.ones((8, 2)), 5, 4)


@pytest.mark.parametrize("name", supports.SUPPORTS)
@pytest.mark.parametrize(("shape", "dtype"), [((16, 16), jnp.bfloat16), ((24, 7), jnp.float32)])
def test_every_selector_returns_sorted_distinct_coordinates(name, shape, dtype):
    """Under jit and vmap, for random, constant, zero and not-a-number kernels."""
    random = jax.random.normal(jax.random.key(1), shape)
    kernels = jnp.stack([random, jnp.ones(shape), jnp.zeros(shape), jnp.full(shape, jnp.nan)]).astype(dtype)
    keys = jax.random.split(jax.random.key(0), len(kernels))
    select = jax.jit(jax.vmap(lambda w, key: supports.SUPPORTS[name](w, 9, key=key)))
    coordinates = select(kernels, keys)
    assert coordinates.shape == (4, 9, 2)
    assert coordinates.dtype == jnp.int32
    flat = np.asarray(coordinates[..., 0] * shape[1] + coordinates[..., 1])
    assert (np.diff(flat) > 0).all()
    assert (np.asarray(coordinates) >= 0).all()
    assert (np.asarray(coordinates) < np.array(shape)).all()
    np.testing.assert_array_equal(select(kernels, keys), coordinates)


@pytest.mark.parametrize("name", supports.SUPPORTS)
@pytest.mark.parametrize("nonzeros", [0, 1, 12])
def test_every_selector_takes_any_count_of_a_tiny_kernel(name, nonzeros):
    coordinates = supports.SUPPORTS[name](jnp.arange(12.0).reshape(12, 1), nonzeros, key=jax.random.key(0))
    assert len({tuple(pair) for pair in coordinates.tolist()}) == nonzeros


@pytest.mark.parametrize("name", supports.SUPPORTS)
def test_every_selector_refuses_more_entries_than_the_kernel_has(name):
    with pytest.raises(InputError, match="nonzeros is 13 for a kernel of 12 entries"):
        supports.SUPPORTS[name](jnp.ones((3, 4)), 13, key=jax.random.key(0))


def test_magnitude_literal():
    w = jnp.array([[0.0, -5.0, 1.0], [5.0, -0.0, 4.0]])
    assert supports.magnitude(w, 3).tolist() == [[0, 1], [1, 0], [1, 2]]
    assert supports.magnitude(jnp.zeros((2, 3)), 4).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]


def test_random_depends_on_its_key_and_reaches_every_entry():
    draws = jax.vmap(lambda key: supports.random(jnp.ones((3, 4)), 3, key=key))(
        jax.random.split(jax.random.key(0), 200)
    )
    counts = np.bincount(np.asarray(draws[..., 0] * 4 + draws[..., 1]).ravel(), minlength=12)
    assert counts.min() > 20


def test_more_entries_than_an_int32_counts_are_refused():
    """By shape alone: the flat index of an entry would not fit."""
    kernel = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    for select in supports.SUPPORTS.values():
        with pytest.raises(InputError, match="2147483648 entries has too many for a support"):
            jax.eval_shape(lambda w, select=select: select(w, 3, key=jax.random.key(0)), kernel)
