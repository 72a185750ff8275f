"""Metrics of a task on its dev set, by the conventions of GLUE (Wang et al. 2019, table 1), with scikit-learn and SciPy.

Both are imported at their first use: with their submodules they take as long as JAX, and accuracy needs neither.
"""

import math
from collections.abc import Callable

import numpy as np
import scipy  # which imports its submodules at their first use

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of equal entries, in [0, 1]; both arrays (n,) of class indices."""
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the F1 score of class 1, in [0, 1]; 0 when class 1 is neither predicted nor present."""
    import sklearn.metrics

    return float(sklearn.metrics.f1_score(labels, predictions, zero_division=0.0))  # pyright: ignore[reportArgumentType]


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation, in [-1, 1]; 0 when all predictions are equal."""
    import sklearn.metrics

    return float(sklearn.metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the linear correlation of two float arrays (n,), in [-1, 1]; 0 when an array is constant."""
    return _correlation(scipy.stats.pearsonr, predictions, labels)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the rank correlation of two float arrays (n,), in [-1, 1]; 0 when an array is constant."""
    return _correlation(scipy.stats.spearmanr, predictions, labels)


def _correlation(measure: Callable, predictions: np.ndarray, labels: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(measure(np.asarray(predictions, np.float64), np.asarray(labels, np.float64)).statistic)


METRICS: dict[str, dict[str, Metric]] = {
    "cola": {"matthews": matthews},
    "mrpc": {"accuracy": accuracy, "f1": f1},
    "qqp": {"accuracy": accuracy, "f1": f1},
    "stsb": {"pearson": pearson, "spearman": spearman},
}
"""Metrics of the tasks of GLUE that have metrics of their own; the first decides the best checkpoint."""


def of_task(glue: str, *, regression: bool) -> dict[str, Metric]:
    """Return the metrics of a task; the first decides the best checkpoint.

    Args:
      glue: the task of GLUE (`METRICS`), or empty for any other data: accuracy, and for a regression those of stsb.
      regression: whether the labels are numbers.
    """
    return METRICS.get(glue, METRICS["stsb"] if regression else {"accuracy": accuracy})


def score(glue: str, logits: np.ndarray, labels: np.ndarray, *, regression: bool) -> dict[str, float]:
    """Return the metrics of a task and its ``loss``; all are not-a-number where a logit is, or where it is infinite.

    Args:
      glue: as for `of_task`.
      logits: (n, classes) float, or (n, 1) for regression.
      labels: (n,) class indices, or floats for regression.
      regression: whether the labels are numbers. The loss is the mean squared error for numbers, else the cross-entropy in
        nats.
    """
    logits, measures = np.asarray(logits, np.float64), of_task(glue, regression=regression)
    # The highest of logits that are not numbers would be the first class.
    if not np.isfinite(logits).all():
        return dict.fromkeys((*measures, "loss"), math.nan)
    if regression:
        predictions = logits[:, 0]
        loss = np.mean((predictions - labels) ** 2)
    else:
        predictions = logits.argmax(-1)
        loss = -np.mean(np.take_along_axis(scipy.special.log_softmax(logits, -1), labels[:, None], -1))
    return {metric: measure(predictions, labels) for metric, measure in measures.items()} | {"loss": float(loss)}
