"""Sensitivity of the loss to units: derivatives by finite differences, and rows that count by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cut_models
import tiny
from dsee_jax import models
from dsee_jax.ckpt import hf
from dsee_jax.deltas import attach
from dsee_jax.errors import InputError
from dsee_jax.prune import earlybert, sensitivity, width


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return hf.load_pretrained(tiny.bert(tmp_path_factory.mktemp("sensitivity") / "base", num_hidden_layers=1))


def test_scores_are_squared_derivatives_of_rows(made):
    model, params = made
    cuts, batch = models.cuts(model), tiny.batch()
    losses = lambda params, batch: jnp.sum(attach.apply(model, params, None, batch) * jnp.array([[1.0, -2.0]]), axis=1)
    scores = sensitivity.taylor(losses, params, cuts, [batch])
    shapes = {"heads": {"layer_0": (3,)}, "neurons": {"layer_0": (40,)}, "layers": (1,)}
    assert jax.tree.map(jnp.shape, scores) == shapes

    start = earlybert.init(cuts, params)

    scaled = jax.jit(lambda coefficients: losses(earlybert.scaled(params, coefficients, cuts), batch))

    def moved(kind, unit, by):
        return scaled(start | {kind: {"layer_0": start[kind]["layer_0"].at[unit].add(by)}})

    # The derivative of the neuron is small: the rounding of the losses needs a longer step.
    for kind, unit, step in (("heads", 1, 1e-2), ("neurons", 7, 1e-1)):
        slopes = (moved(kind, unit, step) - moved(kind, unit, -step)) / (2 * step)
        expected = float(jnp.sum(jnp.square(slopes)))
        assert float(scores[kind]["layer_0"][unit]) == pytest.approx(expected, rel=0.02)
    whole = lambda by: scaled(jax.tree.map(lambda c: c + by, start))
    slopes = (whole(1e-2) - whole(-1e-2)) / 2e-2
    assert float(scores["layers"][0]) == pytest.approx(float(jnp.sum(jnp.square(slopes))), rel=0.02)
    half = [{name: array[part] for name, array in batch.items()} for part in (slice(0, 1), slice(1, None))]
    apart = sensitivity.taylor(losses, params, cuts, half)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-12), apart, scores)


def test_scores_of_hidden_dimensions_are_squared_derivatives_at_all_uses(made):
    model, params = made
    cuts, axes, batch = models.cuts(model), models.hidden_axes(model), tiny.batch()
    losses = lambda params, batch: jnp.sum(attach.apply(model, params, None, batch) * jnp.array([[1.0, -2.0]]), axis=1)
    scores = sensitivity.taylor(losses, params, cuts, [batch], hidden=axes)
    assert jax.tree.map(jnp.shape, scores) == {
        "heads": {"layer_0": (3,)},
        "neurons": {"layer_0": (40,)},
        "hidden": (24,),
        "layers": (1,),
    }
    step, scored = 3e-2, scores["hidden"]

    @jax.jit
    def moved(unit, by):
        with width.weighted(jnp.ones(24).at[unit].add(by), axes):
            return losses(params, batch)

    for unit in (0, 17):
        slopes = (moved(unit, step) - moved(unit, -step)) / (2 * step)
        assert float(scored[unit]) == pytest.approx(float(jnp.sum(jnp.square(slopes))), rel=0.02)


def test_an_input_without_rows_has_no_part_in_the_scores_of_dimensions():
    """DeBERTa's distances have one row for all examples: a batch of one example must not take them for its own."""
    model, params, _ = cut_models.whole("deberta")
    cuts, axes = models.cuts(model), models.hidden_axes(model)
    batch = tiny.batch(types=model.config.type_vocab_size)
    losses = lambda params, batch: jnp.sum(jnp.square(attach.apply(model, params, None, batch)), axis=1)
    rows = [{name: array[row : row + 1] for name, array in batch.items()} for row in range(len(batch["input_ids"]))]
    together, apart = (sensitivity.taylor(losses, params, cuts, each, hidden=axes) for each in ([batch], rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-12), apart, together)


def test_no_batches_are_an_error(made):
    model, params = made
    with pytest.raises(InputError, match="there are no batches"):
        sensitivity.taylor(lambda params, batch: jnp.zeros(2), params, models.cuts(model), [])
