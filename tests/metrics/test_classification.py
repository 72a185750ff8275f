"""Metrics: literals by hand, and the metrics of each task of GLUE."""

import numpy as np
import pytest

from dsee_jax.metrics import classification


def logits(classes):
    return np.eye(2)[classes] * 4.0


def test_literals():
    labels, predictions = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
    assert classification.accuracy(predictions, labels) == 0.75
    assert classification.f1(predictions, labels) == pytest.approx(2 / 3)
    assert classification.matthews(predictions, labels) == pytest.approx(1 / np.sqrt(3))
    assert classification.pearson(np.array([1.0, 2, 3]), np.array([2.0, 4, 6])) == pytest.approx(1)
    assert classification.spearman(np.array([1.0, 2, 30]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert classification.pearson(np.zeros(3), np.array([1.0, 2, 3])) == 0


@pytest.mark.parametrize(
    ("task", "regression", "expected"),
    [
        ("cola", False, ["matthews", "loss"]),
        ("mrpc", False, ["accuracy", "f1", "loss"]),
        ("qqp", False, ["accuracy", "f1", "loss"]),
        ("stsb", True, ["pearson", "spearman", "loss"]),
        ("rte", False, ["accuracy", "loss"]),
        ("", False, ["accuracy", "loss"]),
        ("", True, ["pearson", "spearman", "loss"]),
    ],
)
def test_metrics_by_task(task, regression, expected):
    labels = np.array([0, 1, 1, 0])
    values = labels[:, None] * 1.0 if regression else logits(labels)
    assert list(classification.score(task, values, labels, regression=regression)) == expected


def test_losses():
    loss = classification.score("rte", logits(np.array([0, 0])), np.array([0, 1]), regression=False)["loss"]
    assert loss == pytest.approx(np.mean([np.log1p(np.exp(-4)), np.log1p(np.exp(4))]))
    squared = classification.score("stsb", np.array([[1.0], [2.0]]), np.array([0.0, 4.0]), regression=True)["loss"]
    assert squared == pytest.approx(2.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_have_no_metric(value):
    """Not class 0 of a highest logit, not the constant prediction of a regression."""
    values = logits(np.array([0, 0, 1]))
    values[1, 1] = value
    scores = classification.score("mrpc", values, np.array([0, 0, 1]), regression=False)
    assert scores == pytest.approx({"accuracy": np.nan, "f1": np.nan, "loss": np.nan}, nan_ok=True)
    scores = classification.score("", values[:, 1:], np.array([0.0, 1.0, 2.0]), regression=True)
    assert scores == pytest.approx({"pearson": np.nan, "spearman": np.nan, "loss": np.nan}, nan_ok=True)
