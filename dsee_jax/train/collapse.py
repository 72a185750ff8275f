"""A stage after which a model knows nothing of its task: found by the figures of its evaluations, and said in one line."""

from collections.abc import Mapping

import numpy as np

from dsee_jax.config import TrainConfig
from dsee_jax.data import Task
from dsee_jax.metrics import classification
from dsee_jax.typing import Array

EXPLAINED = 0.01
"""Predicted numbers that explain less than this part of the variance of the labels, however scaled, say nothing of them."""


def warning(stage: str, train: TrainConfig, finding: str) -> str:
    """Return the line about a `finding` in a stage."""
    key = "retune_learning_rate" if stage == "retune" and train.retune_learning_rate else "learning_rate"
    return (
        f"stage {stage}: {finding}; the training collapsed, or was too short: with another output_dir, try a train.{key} "
        f"below {getattr(train, key):g}, a longer train.warmup, or more epochs"
    )


def finding(task: Task, labels: Array, metrics: Mapping[str, float], *, lowest: float, before: float) -> str:
    """Return what is wrong with the model of a stage, in words; empty where nothing is.

    Args:
      task: of the run.
      labels: those of the dev set that chooses the best evaluation.
      metrics: of the best evaluation on it.
      lowest: the lowest loss of all evaluations of the stage.
      before: the loss before any training.
    """
    if alike := _alike(task, np.asarray(labels), metrics):
        return alike
    if lowest >= before:
        return f"the loss on the dev set is never below {lowest:.4g}, and was {before:.4g} before any training"
    return ""


def _alike(task: Task, labels: np.ndarray, metrics: Mapping[str, float]) -> str:
    """Return the words for metrics of equal predictions for all examples; empty for others, and where all labels are equal."""
    if task.problem not in ("single_label_classification", "regression") or (labels == labels[0]).all():
        return ""
    if task.regression:
        if metrics["pearson"] ** 2 >= EXPLAINED:
            return ""
        return f"the predictions for the dev set explain less than {EXPLAINED:.0%} of the variance of the labels"
    measures = classification.of_task(task.glue, regression=False)
    for index in range(len(task.labels)):
        same = np.full_like(labels, index)
        if all(measure(same, labels) == metrics[name] for name, measure in measures.items()):
            return "the scores on the dev set are those of one class for all examples"
    return ""
