"""Random numbers by position."""

import numpy as np

from merge import noise
from merge.leaf import positions


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


def test_key_words_differ_by_seed_tensor_and_model():
    words = {tuple(noise.words(s, n, m).tolist()) for s in (0, 1) for n in ("a", "b") for m in (0, 1)}
    assert len(words) == 8
    np.testing.assert_array_equal(noise.words(0, "a", 0), noise.words(0, "a", 0))
