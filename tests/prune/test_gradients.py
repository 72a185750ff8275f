"""Statistics of gradients equal their formulas on a loss whose gradients are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax import prune
from dsee_jax.errors import InputError
from dsee_jax.prune import gradients

PARAMS = {"a": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}, "b": {"kernel": jnp.ones((2, 2))}}
BATCHES = [jnp.array([[2.0, -1.0], [0.0, 4.0]]), jnp.array([[-1.0, -1.0], [0.0, 2.0]]), jnp.zeros((2, 2))]
"""Each batch is the gradient of `loss` with respect to a/kernel."""


def loss(params, batch):
    return jnp.sum(params["a"]["kernel"] * batch) + jnp.sum(params["b"]["kernel"])


def measured(statistic, batches=BATCHES):
    found = gradients.measure(loss, PARAMS, ["a/kernel"], iter(batches), statistic=statistic)
    assert [*found] == ["a/kernel"]
    return found["a/kernel"]


def test_mean_keeps_signs_and_root_mean_square_does_not_cancel():
    np.testing.assert_allclose(measured("mean"), [[1 / 3, -2 / 3], [0, 2]], rtol=1e-6)
    np.testing.assert_allclose(measured("root_mean_square"), np.sqrt([[5 / 3, 2 / 3], [0, 20 / 3]]), rtol=1e-6)


def test_platon_literals():
    """|G| = 1 always: E is 0.15, 0.2775, 0.385875, without the bias of the authors' first window, 0.075."""
    uncertainty = 0.0
    for count, sensitivity in enumerate((0.15, 0.2775, 0.385875), start=1):
        uncertainty = 0.95 * uncertainty + 0.05 * (1 - sensitivity)
        found = measured("platon", [jnp.full((2, 2), (-1.0) ** count)] * count)
        np.testing.assert_allclose(found, np.full((2, 2), np.sqrt(sensitivity * uncertainty)), rtol=1e-5)


def test_evidence_prunes_the_weights_whose_loss_changes_least():
    """TAYLOR drops the entry without a gradient, and MOVEMENT the one that descent moves towards 0 fastest."""
    kernel = PARAMS["a"]["kernel"]
    for score, statistic, lowest in (("TAYLOR", "root_mean_square", (1, 0)), ("MOVEMENT", "mean", (0, 1))):
        evidence = gradients.measure(loss, PARAMS, ["a/kernel"], BATCHES, statistic=statistic)
        masks = prune.unstructured(PARAMS, None, ["a/kernel"], score=score, sparsity=0.25, gradients=evidence)
        assert [*zip(*np.nonzero(~np.asarray(masks["a"]["kernel"])), strict=True)] == [lowest], kernel


def test_bad_input_names_the_argument():
    with pytest.raises(InputError, match="there are no batches to measure gradients on"):
        measured("mean", [])
    with pytest.raises(InputError, match="statistic is 'rms'"):
        measured("rms")
    with pytest.raises(
        InputError, match=r"'TAYLOR' of 'b/kernel' needs gradients of the shape \(2, 2\); found nothing"
    ):
        prune.unstructured(PARAMS, None, ["b/kernel"], score="TAYLOR", gradients={"a/kernel": jnp.ones((2, 2))})
