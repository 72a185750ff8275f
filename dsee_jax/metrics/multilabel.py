"""Metrics of classification where a text may have any number of labels."""

import math

import numpy as np

NAMES = ("f1_micro", "f1_macro", "subset_accuracy")
"""The metrics; the first decides the best checkpoint."""

THRESHOLD = 0.5
"""A text has the labels whose probabilities are higher."""


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the metrics and the ``loss``; all are not-a-number where a logit is, or where it is infinite.

    ``f1_micro`` is the F1 score of all pairs of a text and a label together, ``f1_macro`` the mean over the labels of the F1
    score of each; 0 for a label that is neither predicted nor present. ``subset_accuracy`` is the fraction of texts of which
    all labels are right. The loss is the mean binary cross-entropy in nats.

    Args:
      logits: (n, classes) float.
      labels: (n, classes), 1 for the labels of a text, else 0.
    """
    logits, given = np.asarray(logits, np.float64), np.asarray(labels) > 0
    if not np.isfinite(logits).all():
        return dict.fromkeys((*NAMES, "loss"), math.nan)
    predicted = logits > math.log(THRESHOLD / (1 - THRESHOLD))
    loss = np.mean(np.logaddexp(0, np.where(given, -logits, logits)))
    hits, wrong = (predicted & given).sum(0), (predicted != given).sum(0)
    return {
        "f1_micro": _f1(hits.sum(), wrong.sum()),
        "f1_macro": float(np.mean([_f1(*pair) for pair in zip(hits, wrong, strict=True)])),
        "subset_accuracy": float(np.mean((predicted == given).all(1))),
        "loss": float(loss),
    }


def _f1(hits: int, wrong: int) -> float:
    """Return 2 hits / (2 hits + misses + false alarms); ``wrong`` counts the misses and the false alarms."""
    return float(2 * hits / (2 * hits + wrong)) if hits else 0.0
