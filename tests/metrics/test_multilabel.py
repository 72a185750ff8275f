"""Metrics of texts with any number of labels, against scikit-learn."""

import math

import numpy as np
import pytest
import sklearn.metrics

from dsee_jax.metrics import multilabel


@pytest.mark.parametrize("classes", [1, 3])
def test_scores_equal_those_of_sklearn(classes):
    generator = np.random.default_rng(classes)
    given = generator.integers(0, 2, (40, classes))
    given[:, -1] = 0 if classes > 1 else given[:, -1]  # a label that is neither predicted nor present
    logits = generator.normal(0, 2, given.shape)
    logits[:, -1] = -1 if classes > 1 else logits[:, -1]
    predicted = 1 / (1 + np.exp(-logits)) > 0.5
    chances = np.where(given, 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits)))
    hits = sum(
        sklearn.metrics.f1_score(given[:, label], predicted[:, label], zero_division=0.0) for label in range(classes)
    )
    assert multilabel.score(logits, given) == pytest.approx(
        {
            "f1_micro": sklearn.metrics.f1_score(given.ravel(), predicted.ravel()),
            "f1_macro": hits / classes,
            "subset_accuracy": np.mean((given == predicted).all(1)),
            "loss": -np.mean(np.log(chances)),
        }
    )


def test_logits_that_are_not_finite_have_no_metric():
    scores = multilabel.score(np.array([[0.0, np.inf]]), np.array([[0, 1]]))
    assert list(scores) == [*multilabel.NAMES, "loss"]
    assert all(map(math.isnan, scores.values()))
