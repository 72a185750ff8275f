"""The table of scores: literals by hand, and the properties of every score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax import config
from dsee_jax.errors import InputError
from dsee_jax.prune.scores import SCORES

W = jnp.array([[1.0, -2.0], [-0.0, 4.0]])
LOW_RANK = jnp.array([[-3.0, 0.5], [0.0, -4.0]])
INPUTS = jnp.array([3.0, 0.5])
UPDATE = jnp.array([[-3.0, 2.0], [-0.25, 0.0]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("W", [[1, 2], [0, 4]]),
        ("WAB", [[2, 1.5], [0, 0]]),
        ("WABS", [[2, 0], [0.25, 4]]),
        ("AB", [[3, 0.5], [0, 4]]),
        ("ABS", [[3, 2], [0.25, 0]]),
        ("NAB", [[1 / 3, 2], [np.inf, 0.25]]),
        ("NABS", [[1 / 3, 0.5], [4, np.inf]]),
        ("WANDA", [[3, 6], [0, 2]]),
    ],
)
def test_literals(name, expected):
    np.testing.assert_allclose(SCORES[name](W, LOW_RANK, UPDATE, inputs=INPUTS), expected, rtol=1e-6)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_score_is_float32_and_never_negative(name, dtype):
    w, low_rank, update = jax.random.normal(jax.random.key(0), (3, 5, 4, 6)).astype(dtype)
    keys = jax.random.split(jax.random.key(1), 5)
    one = lambda w, low_rank, update, key: SCORES[name](w, low_rank, update, key=key, inputs=jnp.ones(w.shape[-2]))
    together = jax.jit(jax.vmap(one))(w, low_rank, update, keys)
    assert together.shape == w.shape
    assert together.dtype == jnp.float32
    assert (together >= 0).all()
    np.testing.assert_allclose(one(w[0], low_rank[0], update[0], keys[0]), together[0], rtol=1e-6)


def test_config_lists_the_scores_by_the_properties_of_the_table():
    """The config imports no JAX and repeats the names."""
    assert tuple(name for name, score in SCORES.items() if score.of_units) == config.UNIT_SCORES
    assert tuple(name for name, score in SCORES.items() if score.reads == ("low_rank",)) == config.LOW_RANK_SCORES


def test_random_needs_a_key():
    with pytest.raises(InputError, match="key"):
        SCORES["random"](W, LOW_RANK, UPDATE)


def test_wanda_needs_the_sizes_of_inputs():
    with pytest.raises(InputError, match=r"inputs=dsee_jax\.prune\.calibration\.sizes"):
        SCORES["WANDA"](W, LOW_RANK, UPDATE)
