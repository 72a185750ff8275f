"""Scores of a model on the dev sets of a task."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsee_jax import tree
from dsee_jax.config import Config
from dsee_jax.data import Task
from dsee_jax.data.batches import eval_batches
from dsee_jax.generation import texts
from dsee_jax.metrics import classification, text
from dsee_jax.train import sharding, step
from dsee_jax.train.inputs import Data
from dsee_jax.train.sharding import Placement

Evaluate = Callable[[dict[str, Any], step.Frozen], dict[str, float]]


def predictor(
    model: nn.Module, config: Config, placed: Placement, *, causal: bool
) -> Callable[[dict[str, Any], step.Frozen, Any], jax.Array]:
    """Return the function ``(trained, frozen, batch) -> what is scored``, to be compiled, the same on all devices.

    Logits (rows, labels), or where ``causal`` (2,): the sum of losses, and of how many tokens.
    """
    joined = placed.mesh.shape["tensor"] == 1

    def predict(trained: dict[str, Any], frozen: step.Frozen, batch: Any) -> jax.Array:
        with sharding.rows_divided(placed.mesh):
            found = step.predict(model, trained, frozen, batch, config.delta, joined=joined, deterministic=True)
        if causal:
            losses = step.losses(found, batch["labels"], regression=False)
            found = jnp.stack([jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])])
        # Every process reads all of it.
        return jax.lax.with_sharding_constraint(found, NamedSharding(placed.mesh, PartitionSpec()))

    return predict


def evaluator(model: nn.Module, config: Config, data: Data, placed: Placement) -> Evaluate:
    """Return the function ``(trained, frozen) -> metrics``, dropout off, every example once.

    The metrics of the first dev set have their plain names; those of a second (MNLI's mismatched) end in ``_<set>``. Those of
    causal-lm are the ``loss`` in nats, the mean over all tokens of responses, and ``perplexity``, its exponential.
    """
    task = data.task

    predict = jax.jit(predictor(model, config, placed, causal=task.causal))

    def evaluate(trained: dict[str, Any], frozen: step.Frozen) -> dict[str, float]:
        trained, frozen = sharding.place(placed, (trained, frozen))
        found: dict[str, float] = {}
        for number, (name, tokens) in enumerate(data.dev.items()):
            logits, total = np.zeros((tokens.size, task.num_labels), np.float32), np.zeros(2)
            for batch, rows in eval_batches(tokens, config.train.batch_size, data.edges):
                seen = np.asarray(predict(trained, frozen, sharding.split(placed.mesh, batch)))
                if task.causal:
                    total += seen
                else:
                    logits[rows] = seen[: len(rows)]
            if task.causal:
                loss = float(total[0] / total[1])
                # What is beyond this is no number that a file of JSON can hold.
                scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            else:
                scores = classification.score(task.name, logits, tokens.labels, regression=task.regression)
            found |= {key if number == 0 else f"{key}_{name}": value for key, value in scores.items()}
        return found

    return evaluate


def writer(model: nn.Module, config: Config, data: Data, placed: Placement) -> Evaluate:
    """Return the function ``(trained, frozen) -> bleu, nist, rouge_l`` of texts written for the first dev set's prompts.

    Nothing is returned where the config asks for no texts.
    """
    options, exercise = config.generate, data.exercise
    search = {name: getattr(options, name) for name in ("new_tokens", "beams", "length_penalty", "early_stopping")}

    def write(trained: dict[str, Any], frozen: step.Frozen) -> dict[str, float]:
        if exercise is None:
            return {}
        trained, frozen = sharding.place(placed, (trained, frozen))
        delta = config.delta
        written = texts.texts(
            model,
            tree.join(frozen.params, trained["params"]),
            exercise.tokenizer,
            exercise.prompts,
            ends=exercise.ends,
            pad=exercise.pad,
            batch_size=options.batch_size,
            updates={
                "deltas": trained["deltas"],
                "supports": frozen.supports,
                "scale": delta.scale,
                "scale_sparse": delta.scale_sparse,
            },
            **search,
        )
        return text.score([text.strip() for text in written], exercise.references)

    return write


def selection_score(task: Task) -> Callable[[dict[str, float]], float]:
    """Return what decides between two evaluations, from their metrics: the larger is better."""
    if task.causal:
        return lambda found: -found["loss"]
    name = next(iter(classification.of_task(task.name, regression=task.regression)))
    return lambda found: found[name]
