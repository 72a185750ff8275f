"""The optimiser: schedules, weight decay, clipping, and parity with optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsee_jax.config import TrainConfig
from dsee_jax.train import optim


def test_rate_rises_and_falls_to_zero():
    rate = optim.schedule(1.0, 20, 0.1)
    np.testing.assert_allclose([rate(s) for s in (0, 1, 2, 11, 20)], [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_rate_without_warmup_starts_at_the_peak():
    assert float(optim.schedule(1.0, 10, 0.0)(0)) == 1.0


def test_rate_of_a_search_rises_and_stays():
    rate = optim.warmup_constant(1.0, 20, 0.1)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 1, 2, 11, 20)], [0, 0.5, 1, 1, 1])
    assert float(optim.warmup_constant(1.0, 4, 0.1)(0)) == 1.0


def test_only_matrices_decay():
    trained = {
        "deltas": {"kernel": {"a": 1, "b": 1, "values": 1}},
        "params": {"head": {"kernel": 1, "bias": 1}, "norm": {"scale": 1}, "word": {"embedding": 1}},
    }
    assert optim.decay_mask(trained) == {
        "deltas": {"kernel": {"a": True, "b": True, "values": False}},
        "params": {"head": {"kernel": True, "bias": False}, "norm": {"scale": False}, "word": {"embedding": True}},
    }


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_clipping_bounds_the_gradient_of_adam(clip):
    tree = {"x": {"kernel": jnp.zeros(4)}}
    optimizer = optim.adamw(TrainConfig(clip=clip))
    _, state = optimizer.update({"x": {"kernel": jnp.full(4, 10.0)}}, optimizer.init(tree), tree)
    adam = state[1] if clip else state[0]
    assert float(jnp.linalg.norm(adam.mu["x"]["kernel"])) == pytest.approx(0.1 * (1.0 if clip else 20.0), rel=1e-5)


def test_adamw_equals_optax():
    """The rate is applied by the caller."""
    tree = {"x": {"kernel": jnp.array([1.0, -2.0])}, "y": {"bias": jnp.array([3.0])}}
    gradient = jax.tree.map(lambda w: 0.1 * w + 1, tree)
    ours, theirs = optim.adamw(TrainConfig(clip=0.0)), optax.adamw(0.01, weight_decay=0.01, mask=optim.decay_mask)
    a, b = ours.init(tree), theirs.init(tree)
    for _ in range(3):
        updates, a = ours.update(gradient, a, tree)
        expected, b = theirs.update(gradient, b, tree)
        jax.tree.map(lambda u, e: np.testing.assert_allclose(-0.01 * u, e, rtol=1e-6), updates, expected)
