"""GreBsmo finds planted spikes, and the decompositions agree with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax.deltas import decompose
from dsee_jax.errors import InputError


def planted(seed: int, shape: tuple[int, int], rank: int, noise: float, spike: float) -> tuple[np.ndarray, set[int]]:
    """Return low rank (entries about 1) + noise + 64 spikes of 1 to 1.5 times ``spike`` in magnitude, and their indices."""
    draw = np.random.default_rng(seed)
    w = draw.normal(size=(shape[0], rank)) @ draw.normal(size=(rank, shape[1])) / np.sqrt(rank)
    w += noise * draw.normal(size=shape)
    index = draw.choice(w.size, 64, replace=False)
    w.ravel()[index] += spike * draw.choice([-1, 1], 64) * draw.uniform(1, 1.5, 64)
    return w.astype(np.float32), set(index.tolist())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("shape", "true_rank", "rank", "noise", "spike"),
    [
        ((768, 768), 16, 16, 0.01, 0.1),  # spikes are a tenth of the entries of the low-rank part; the rank is exact
        ((768, 768), 16, 192, 0.01, 5.0),  # 12 times the rank: the low-rank part could fit the spikes
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
    """All 64, though spikes need not be the largest entries and the rank is only an upper bound."""
    w, truth = planted(0, shape, true_rank, noise, spike)
    assert set(decompose.spikes(w, rank, 64, key=jax.random.key(0)).tolist()) == truth


def test_spikes_without_noise_are_found():
    """The basis has more columns than the rank of the matrix, so its columns are nearly dependent."""
    w, truth = planted(1, (64, 64), 4, 0.0, 0.5)
    assert set(decompose.spikes(w, 8, 64, key=jax.random.key(0)).tolist()) == truth


def test_parts_of_grebsmo():
    """Shapes, orthonormal u, exactly 64 entries of s, and a residual of the size of the noise."""
    w, truth = planted(2, (96, 192), 8, 0.01, 0.5)
    u, v, s = decompose.grebsmo(w, rank=8, nonzeros=64, key=jax.random.key(0))
    assert (u.shape, v.shape, s.shape) == ((96, 8), (8, 192), (96, 192))
    np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-5)
    assert set(np.flatnonzero(s).tolist()) == truth
    rest = w - np.asarray(u @ v + s)
    assert rest.std() < 0.0105
    assert np.abs(rest).max() < 0.06


def test_spikes_under_vmap_equal_spikes_of_each_matrix():
    w = np.stack([planted(seed, (64, 64), 4, 0.01, 1.0)[0] for seed in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda w, key: decompose.spikes(w, 8, 64, key=key)))(w, keys)
    for w_one, key, indices in zip(w, keys, together, strict=True):
        assert set(decompose.spikes(w_one, 8, 64, key=key).tolist()) == set(indices.tolist())


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e15])
def test_spikes_do_not_depend_on_the_scale(scale):
    w, truth = planted(0, (64, 64), 4, 0.01, 1.0)
    assert set(decompose.spikes(w * np.float32(scale), 8, 64, key=jax.random.key(0)).tolist()) == truth


def test_spikes_of_rank_zero_are_the_largest_magnitudes():
    assert decompose.spikes(jnp.array([[1.0, -3.0, 2.0]]), 0, 2, key=jax.random.key(0)).tolist() == [1, 2]


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_svd_equals_numpy(shape):
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


def test_out_of_range_argument_is_named():
    w, key = jnp.ones((8, 6)), jax.random.key(0)
    with pytest.raises(InputError, match="rank is 4 for a matrix of 8 x 6: use 0 to 3"):
        decompose.grebsmo(w, 4, 2, key=key)
    with pytest.raises(InputError, match="nonzeros is 49"):
        decompose.grebsmo(w, 2, 49, key=key)
    with pytest.raises(InputError, match="use 0 to 6"):
        decompose.svd(w, 7)
    with pytest.raises(InputError, match="vmap"):
        decompose.svd(jnp.ones((2, 3, 3)), 1)
