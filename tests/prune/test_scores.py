"""The table of scores: literals by hand, and the properties of every score."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax import config
from dsee_jax.errors import InputError
from dsee_jax.prune import gradients
from dsee_jax.prune.scores import SCORES

W = jnp.array([[1.0, -2.0], [-0.0, 4.0]])
LOW_RANK = jnp.array([[-3.0, 0.5], [0.0, -4.0]])
INPUTS = jnp.array([3.0, 0.5])
GRADIENTS = jnp.array([[2.0, -1.0], [5.0, -3.0]])
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
        ("MOVEMENT", [[-2, -2], [0, 12]]),
        ("TAYLOR", [[2, 2], [0, 12]]),
        ("PLATON", [[2, 2], [0, 12]]),
    ],
)
def test_literals(name, expected):
    evidence = {"inputs": INPUTS, "gradients": GRADIENTS}
    np.testing.assert_allclose(SCORES[name](W, LOW_RANK, UPDATE, **evidence), expected, rtol=1e-6)


def test_ria_literals():
    """Inputs of one size leave the relative size; others count by their root, over that of their mean square, 8.5."""
    w, zeros = jnp.array([[1.0, -2.0], [3.0, 4.0]]), jnp.zeros((2, 2))
    ria = SCORES["RIA"]
    relative = [[0.583333, 1], [1.178571, 1.238095]]
    np.testing.assert_allclose(ria(w, zeros, zeros, inputs=jnp.full(2, 7.0)), relative, rtol=1e-5)
    expected = np.array([[1.166667, 2], [1.178571, 1.238095]]) / 8.5**0.25
    np.testing.assert_allclose(ria(w, zeros, zeros, inputs=jnp.array([4.0, 1.0])), expected, rtol=1e-5)


def test_ria_compares_kernels_of_all_sizes_and_scales():
    """The mean is 1 whatever the shape and the scale; a tiny row is not wiped out; rows and columns of zeros score 0."""
    w = jax.random.normal(jax.random.key(0), (6, 15))
    ria = lambda w, inputs: SCORES["RIA"](w, w, w, inputs=inputs)
    assert float(ria(w, jnp.full(6, 3.0)).mean()) == pytest.approx(1)
    np.testing.assert_allclose(ria(9 * w, jnp.ones(6)), ria(w, jnp.ones(6)), rtol=1e-5)
    tiny = w.at[2].multiply(1e-4)
    assert ria(tiny, jnp.ones(6))[2].sum() > 0.25 * ria(w, jnp.ones(6))[2].sum()
    zeros = w.at[2].set(0).at[:, 4].set(0)
    scores = ria(zeros, jnp.ones(6))
    assert (scores[2] == 0).all()
    assert (scores[:, 4] == 0).all()
    assert jnp.isfinite(scores).all()
    assert (ria(w, jnp.zeros(6)) == 0).all()


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_score_is_float32_and_all_but_movement_never_negative(name, dtype):
    w, low_rank, update = jax.random.normal(jax.random.key(0), (3, 5, 4, 6)).astype(dtype)
    keys = jax.random.split(jax.random.key(1), 5)
    evidence = lambda w: {"inputs": jnp.ones(w.shape[-2]), "gradients": jnp.sin(jnp.arange(24.0)).reshape(w.shape)}
    one = lambda w, low_rank, update, key: SCORES[name](w, low_rank, update, key=key, **evidence(w))
    together = jax.jit(jax.vmap(one))(w, low_rank, update, keys)
    assert together.shape == w.shape
    assert together.dtype == jnp.float32
    assert (together >= 0).all() == (name != "MOVEMENT")
    np.testing.assert_allclose(one(w[0], low_rank[0], update[0], keys[0]), together[0], rtol=1e-6)


def test_config_lists_the_scores_by_the_properties_of_the_table():
    """The config imports no JAX and repeats the names."""
    assert tuple(name for name, score in SCORES.items() if score.of_units) == config.UNIT_SCORES
    assert {name for name, score in SCORES.items() if score.of_update} == {*config.UPDATE_SCORES}
    assert {name for name, score in SCORES.items() if "inputs" in score.reads} | {"SPARSEGPT"} == {*config.INPUT_SCORES}
    assert {*typing.get_args(config.ScoreName)} == {*SCORES, "SPARSEGPT"}
    assert {score.statistic for score in SCORES.values() if "gradients" in score.reads} == {*gradients.STATISTICS}


def test_random_needs_a_key():
    with pytest.raises(InputError, match="key"):
        SCORES["random"](W, LOW_RANK, UPDATE)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("WANDA", r"inputs=dsee_jax\.prune\.calibration\.sizes"),
        ("TAYLOR", r"gradients=dsee_jax\.prune\.gradients\.measure"),
    ],
)
def test_scores_of_examples_name_the_function_that_measures(name, line):
    with pytest.raises(InputError, match=line):
        SCORES[name](W, LOW_RANK, UPDATE)
