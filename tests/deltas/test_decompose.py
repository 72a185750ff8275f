"""GreBsmo finds what was planted; the decompositions agree with NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax.deltas import decompose
from dsee_jax.errors import InputError


def planted(seed: int, shape: tuple[int, int], rank: int, noise: float, spike: float) -> tuple[np.ndarray, set[int]]:
    """Low rank (entries about 1) + noise + 64 spikes of 1 to 1.5 times ``spike``, either sign; and where they are."""
    draw = np.random.default_rng(seed)
    w = draw.normal(size=(shape[0], rank)) @ draw.normal(size=(rank, shape[1])) / np.sqrt(rank)
    w += noise * draw.normal(size=shape)
    index = draw.choice(w.size, 64, replace=False)
    w.ravel()[index] += spike * draw.choice([-1, 1], 64) * draw.uniform(1, 1.5, 64)
    return w.astype(np.float32), set(index.tolist())


@pytest.mark.parametrize(
    ("shape", "true_rank", "rank", "noise", "spike"),
    [
        ((768, 768), 16, 16, 0.01, 0.1),  # a tenth of the entries of the low-rank part, and the rank known
        ((768, 768), 16, 192, 0.01, 5.0),  # 12 times the rank, spikes that the low-rank part could follow
        ((384, 384), 32, 32, 0.001, 0.5),
        ((384, 384), 16, 32, 0.1, 1.0),
        ((128, 128), 16, 32, 0.01, 0.1),
        ((128, 128), 10, 32, 0.01, 0.5),
        ((128, 128), 10, 32, 0.1, 1.0),
        ((96, 192), 8, 16, 0.01, 0.5),
        ((192, 96), 8, 16, 0.01, 0.5),
    ],
)
def test_every_planted_spike_is_found(shape, true_rank, rank, noise, spike):
    """What it is for: 64 of 64, though no spike is the largest entry around and the rank is only known to be enough."""
    w, truth = planted(0, shape, true_rank, noise, spike)
    assert set(decompose.spikes(w, rank, 64, key=jax.random.key(0)).tolist()) == truth


def test_spikes_without_noise_are_found_too():
    """The basis then has more columns than the matrix has rank, which a careless orthonormalisation does not survive."""
    w, truth = planted(1, (64, 64), 4, 0.0, 0.5)
    assert set(decompose.spikes(w, 8, 64, key=jax.random.key(0)).tolist()) == truth


def test_the_parts_of_grebsmo():
    """Shapes, orthonormal u, exactly 64 entries of s, and a rest of the size of the noise."""
    w, truth = planted(2, (96, 192), 8, 0.01, 0.5)
    u, v, s = decompose.grebsmo(w, rank=8, nonzeros=64, key=jax.random.key(0))
    assert (u.shape, v.shape, s.shape) == ((96, 8), (8, 192), (96, 192))
    np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-5)
    assert set(np.flatnonzero(s).tolist()) == truth
    rest = w - np.asarray(u @ v + s)
    assert rest.std() < 0.0105
    assert np.abs(rest).max() < 0.06


def test_many_matrices_in_one_call_equal_one_at_a_time():
    w = np.stack([planted(seed, (64, 64), 4, 0.01, 1.0)[0] for seed in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda w, key: decompose.spikes(w, 8, 64, key=key)))(w, keys)
    for w_one, key, found in zip(w, keys, together, strict=True):
        assert set(decompose.spikes(w_one, 8, 64, key=key).tolist()) == set(found.tolist())


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e15])
def test_the_scale_of_the_matrix_does_not_matter(scale):
    w, truth = planted(0, (64, 64), 4, 0.01, 1.0)
    assert set(decompose.spikes(w * np.float32(scale), 8, 64, key=jax.random.key(0)).tolist()) == truth


def test_rank_zero_is_the_largest_magnitude():
    assert decompose.spikes(jnp.array([[1.0, -3.0, 2.0]]), 0, 2, key=jax.random.key(0)).tolist() == [1, 2]


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_svd_is_numpys(shape):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, s, v = map(np.asarray, decompose.svd(w, 7))
    expected = np.linalg.svd(w)
    np.testing.assert_allclose(s, expected[1][:7], rtol=1e-5)
    np.testing.assert_allclose((u * s) @ v, (expected[0][:, :7] * expected[1][:7]) @ expected[2][:7], atol=1e-4)


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)])
def test_randomized_svd_is_near_svd(shape):
    draw = np.random.default_rng(0)
    w = (draw.normal(size=(shape[0], 5)) @ draw.normal(size=(5, shape[1])) + 0.01 * draw.normal(size=shape)).astype(
        "f4"
    )
    u, s, v = map(np.asarray, decompose.randomized_svd(w, 5, key=jax.random.key(0)))
    best = list(map(np.asarray, decompose.svd(w, 5)))
    np.testing.assert_allclose(s, best[1], rtol=1e-4)
    np.testing.assert_allclose((u * s) @ v, (best[0] * best[1]) @ best[2], atol=1e-3)
    assert decompose.randomized_svd(w, 50, key=jax.random.key(0))[1].shape == (50,)


def test_what_is_out_of_range_is_named():
    w, key = jnp.ones((8, 6)), jax.random.key(0)
    with pytest.raises(InputError, match="rank is 4 for a matrix of 8 x 6: use 0 to 3"):
        decompose.grebsmo(w, 4, 2, key=key)
    with pytest.raises(InputError, match="nonzeros is 49"):
        decompose.grebsmo(w, 2, 49, key=key)
    with pytest.raises(InputError, match="use 0 to 6"):
        decompose.svd(w, 7)
    with pytest.raises(InputError, match="vmap"):
        decompose.svd(jnp.ones((2, 3, 3)), 1)
