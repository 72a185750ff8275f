"""Metrics of a model on the dev sets of a task, and of the texts that it generates."""

import math
from collections.abc import Callable, Mapping
from typing import Any

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
from dsee_jax.models.architecture import Model
from dsee_jax.train import sharding, step
from dsee_jax.train.inputs import Data
from dsee_jax.train.sharding import Placement

Evaluate = Callable[[dict[str, Any], step.Frozen], dict[str, float]]


def predictor(
    model: Model, config: Config, placed: Placement, *, causal: bool
) -> Callable[[dict[str, Any], step.Frozen, Any], jax.Array]:
    """Return the function ``(trained, frozen, batch) -> scores`` for ``jit``; its result is replicated on all devices.

    The scores are logits (rows, labels), or with ``causal`` (2,): the sum of token losses and the number of those tokens.
    """
    joined = placed.mesh.shape["tensor"] == 1

    def predict(trained: dict[str, Any], frozen: step.Frozen, batch: Any) -> jax.Array:
        with sharding.constrain_rows(placed.mesh):
            scores = step.predict(model, trained, frozen, batch, config.delta, joined=joined, deterministic=True)
        if causal:
            losses = step.losses(scores, batch["labels"], regression=False)
            scores = jnp.stack([jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])])
        # Every process reads all rows.
        return jax.lax.with_sharding_constraint(scores, NamedSharding(placed.mesh, PartitionSpec()))

    return predict


def evaluator(model: Model, config: Config, data: Data, placed: Placement) -> Evaluate:
    """Return the function ``(trained, frozen) -> metrics``; dropout is off, every example counts once.

    The metrics of the first dev set have plain names; those of a second dev set (MNLI's mismatched) end in ``_<set>``.
    Causal-lm has the ``loss`` in nats, the mean over all response tokens, and ``perplexity``, its exponential.
    """
    task = data.task
    predict = jax.jit(predictor(model, config, placed, causal=task.causal))

    def evaluate(trained: dict[str, Any], frozen: step.Frozen) -> dict[str, float]:
        trained, frozen = sharding.place(placed, (trained, frozen))
        metrics: dict[str, float] = {}
        for number, (name, tokens) in enumerate(data.dev.items()):
            logits, total = np.zeros((tokens.size, task.num_labels), np.float32), np.zeros(2)
            for batch, rows in eval_batches(tokens, config.train.batch_size, data.edges):
                output = np.asarray(predict(trained, frozen, sharding.split(placed.mesh, batch)))
                if task.causal:
                    total += output
                else:
                    logits[rows] = output[: len(rows)]
            if task.causal:
                loss = float(total[0] / total[1])
                # exp of a larger loss is infinite, which JSON cannot represent.
                scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            else:
                scores = classification.score(task.glue, logits, tokens.labels, regression=task.regression)
            metrics |= {key if number == 0 else f"{key}_{name}": value for key, value in scores.items()}
        return metrics

    return evaluate


def writer(model: Model, config: Config, data: Data, placed: Placement) -> Evaluate:
    """Return the function ``(trained, frozen) -> {bleu, nist, rouge_l}`` of texts generated for the first dev set's prompts.

    The metrics are empty where ``generate.new_tokens`` is 0.
    """
    options, delta, references = config.generate, config.delta, data.references
    search = {name: getattr(options, name) for name in ("new_tokens", "beams", "length_penalty", "early_stopping")}

    def write(trained: dict[str, Any], frozen: step.Frozen) -> dict[str, float]:
        if references is None:
            return {}
        trained, frozen = sharding.place(placed, (trained, frozen))
        updates = step.adapter(trained, frozen.supports, delta)
        params = tree.join(frozen.params, trained["params"])
        decoder = texts.Writer(model, params, updates, references.tokenizer, references.ends, references.pad)
        generated = texts.generate(decoder, references.prompts, batch_size=options.batch_size, **search)
        return text.score([each.strip() for each in generated], references.texts)

    return write


def finite(metrics: Mapping[str, float]) -> bool:
    """Return whether all metrics are finite. Those of a model that gives not-a-number are not, and never the best."""
    return all(map(math.isfinite, metrics.values()))


def selection_score(task: Task) -> Callable[[dict[str, float]], float]:
    """Return the function from metrics to the score that selects the best evaluation; larger is better."""
    if task.causal:
        return lambda metrics: -metrics["loss"]
    name = next(iter(classification.of_task(task.glue, regression=task.regression)))
    return lambda metrics: metrics.get(name, -math.inf)
