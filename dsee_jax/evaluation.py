"""Scores of a model on the dev sets of a task."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dsee_jax import metrics, sharding, step
from dsee_jax.config import Config
from dsee_jax.data.batches import eval_batches
from dsee_jax.setup import Data

Evaluate = Callable[[dict[str, Any], step.Frozen], dict[str, float]]


def evaluator(model: nn.Module, config: Config, data: Data, mesh: jax.sharding.Mesh) -> Evaluate:
    """Return the function ``(trained, frozen) -> metrics``, dropout off, every example once.

    The metrics of the first dev set have their plain names; those of a second (MNLI's mismatched) end in ``_<set>``.
    """
    regression = data.task.regression

    @jax.jit
    def predict(trained: Any, frozen: step.Frozen, batch: Any) -> jax.Array:
        return step.predict(model, trained, frozen, batch, config.delta, deterministic=True)

    def evaluate(trained: dict[str, Any], frozen: step.Frozen) -> dict[str, float]:
        trained, frozen = sharding.copy(mesh, (trained, frozen))
        found: dict[str, float] = {}
        for number, (name, tokens) in enumerate(data.dev.items()):
            logits = np.zeros((len(tokens.labels), data.task.num_labels), np.float32)
            for batch, rows in eval_batches(tokens, config.train.batch_size, data.edges):
                logits[rows] = np.asarray(predict(trained, frozen, sharding.split(mesh, batch)))[: len(rows)]
            scores = metrics.score(config.data.task, logits, tokens.labels, regression=regression)
            found |= {key if number == 0 else f"{key}_{name}": value for key, value in scores.items()}
        return found

    return evaluate
