"""The optimiser: schedules, weight decay, clipping, and parity with optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsee_jax import tree
from dsee_jax.config import RatesConfig, TrainConfig
from dsee_jax.train import optim


def test_rate_rises_and_falls_to_zero():
    rate = optim.schedule(1.0, 20, 0.1)
    np.testing.assert_allclose([rate(s) for s in (0, 1, 2, 11, 20)], [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_rate_without_warmup_starts_at_the_peak():
    assert float(optim.schedule(1.0, 10, 0.0)(0)) == 1.0


def test_rate_rises_again_in_each_round():
    """Rounds from 0, 10 and 16 to 26 steps, each with a warm-up of a fifth."""
    rate = optim.restarted(1.0, [0, 10, 16], 26, 0.2)
    found = [float(rate(step)) for step in (0, 1, 2, 6, 10, 11, 12, 16, 18, 26)]
    np.testing.assert_allclose(found, [0, 0.5, 1, 0.5, 0, 1, 0.8, 0, 1, 0], atol=1e-6)
    whole, one = optim.schedule(1.0, 20, 0.1), optim.restarted(1.0, [0], 20, 0.1)
    assert [whole(step) for step in range(21)] == [one(step) for step in range(21)]


def test_rates_of_the_host_are_those_of_optax():
    """To the last bit: the same seed gives the same figures."""
    for peak, steps, warmup in ((5e-4, 23, 0.1), (1e-3, 7, 0.0), (3e-5, 101, 0.06)):
        up = round(warmup * steps)
        lines = [optax.linear_schedule(0.0, peak, up), optax.linear_schedule(peak, 0.0, max(steps - up, 1))]
        rate, other = optim.schedule(peak, steps, warmup), optax.join_schedules(lines, [up])
        assert [rate(step) for step in range(steps + 2)] == [np.float32(other(step)) for step in range(steps + 2)]


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


def moved(rates, head=(), **options):
    """The change of each leaf in the first step, over that of the same optimiser without factors."""
    trained = {
        "deltas": {"x": {"kernel": {"a": jnp.ones(3), "b": -jnp.ones(3), "values": jnp.ones(2)}}},
        "params": {"head": {"kernel": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}},
        "coefficients": {"heads": jnp.ones(2)},
    }
    gradient = jax.tree.map(lambda w: 0.3 * w + 1, trained)

    def step(rates):
        optimizer = optim.adamw(TrainConfig(rates=rates, **options), head)
        updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(trained), trained)
        return updates

    ratio = jax.tree.map(lambda u, plain: float(np.mean(u / plain)), step(rates), step(RatesConfig()))
    return {key: value for key, value in tree.flatten(ratio).items() if value != 1}


def test_each_part_has_a_learning_rate_of_its_own():
    """LoRA+ moves B 16 times as far as A, weight decay included; only the head of all params has the rate of the head."""
    found = moved(RatesConfig(b=16, values=3, head=2), ("head/kernel",), weight_decay=0.1)
    assert found == pytest.approx(
        {"deltas/x/kernel/b": 16, "deltas/x/kernel/values": 3, "params/head/kernel": 2}, rel=1e-6
    )
    assert moved(RatesConfig(a=0.5)) == {"deltas/x/kernel/a": 0.5}


def test_rates_of_one_leave_the_optimiser_as_it_is():
    plain = optim.adamw(TrainConfig()).init({"x": {"kernel": jnp.zeros(2)}})
    assert len(plain) == 3
    assert len(optim.adamw(TrainConfig(rates=RatesConfig(a=2))).init({"x": {"kernel": jnp.zeros(2)}})) == 4
