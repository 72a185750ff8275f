"""Metrics of a model on the dev sets of a task, and of the texts that it generates."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsee_jax import tree
from dsee_jax.config import Config
from dsee_jax.data import Task
from dsee_jax.data.batches import eval_batches
from dsee_jax.generation import texts
from dsee_jax.metrics import text
from dsee_jax.models.architecture import Model
from dsee_jax.train import sharding, step
from dsee_jax.train.inputs import Data
from dsee_jax.train.problems import PROBLEMS, Problem
from dsee_jax.train.sharding import Placement


class Evaluate(Protocol):
    """``(trained, frozen) -> metrics``."""

    def __call__(self, trained: dict[str, Any], frozen: step.Frozen, *, final: bool = False) -> dict[str, float]:
        """Return the metrics of the dev sets; with ``data.split_dev`` of the validation or (``final``) of the test halves."""
        ...


class Written(NamedTuple):
    """Generated texts, and their metrics; both are empty where ``generate.new_tokens`` is 0."""

    metrics: dict[str, float]  # of `dsee_jax.metrics.text.NAMES`
    records: list[dict[str, Any]]  # of each prompt: prompt, text, references


Write = Callable[[dict[str, Any], step.Frozen], Written]


def predictor(
    model: Model, config: Config, placed: Placement, problem: Problem
) -> Callable[[dict[str, Any], step.Frozen, Any], Any]:
    """Return the function ``(trained, frozen, batch) -> summary`` for ``jit``; its result is replicated on all devices.

    The summary is that of the ``problem``, one for each row.
    """
    joined = placed.mesh.shape["tensor"] == 1

    def predict(trained: dict[str, Any], frozen: step.Frozen, batch: Any) -> Any:
        with sharding.constrain_rows(placed.mesh):
            outputs = step.predict(model, trained, frozen, batch, config.delta, joined=joined, deterministic=True)
        # Every process reads all rows.
        summary = problem.summary(outputs, batch)
        return jax.lax.with_sharding_constraint(summary, NamedSharding(placed.mesh, PartitionSpec()))

    return predict


def evaluator(model: Model, config: Config, data: Data, placed: Placement) -> Evaluate:
    """Return the function from a model to its metrics; dropout is off, every example counts once.

    The metrics of the first dev set have plain names; those of a second dev set (MNLI's mismatched) end in ``_<set>``.
    Causal-lm has the ``loss`` in nats, the mean over all response tokens, and ``perplexity``, its exponential.
    """
    problem = PROBLEMS[data.task.problem]
    predict = jax.jit(predictor(model, config, placed, problem))

    def evaluate(trained: dict[str, Any], frozen: step.Frozen, *, final: bool = False) -> dict[str, float]:
        trained, frozen = sharding.place(placed, (trained, frozen))
        metrics: dict[str, float] = {}
        sets, examples = data.dev, data.task.dev
        if final:
            sets, examples = sets | data.scoring, {**examples, **data.task.scoring}
        for number, (name, tokens) in enumerate(sets.items()):
            summaries: list[Any] = [None] * tokens.size
            for batch, rows in eval_batches(tokens, config.train.batch_size, data.edges):
                output = np.asarray(predict(trained, frozen, sharding.split(placed.mesh, batch)))
                for row, summary in zip(rows, output, strict=False):  # filler rows come last
                    summaries[row] = summary
            scores = problem.score(data.task, examples[name], tokens, summaries)
            metrics |= {key if number == 0 else f"{key}_{name}": value for key, value in scores.items()}
        return metrics

    return evaluate


def writer(model: Model, config: Config, data: Data, placed: Placement) -> Write:
    """Return the function ``(trained, frozen) -> Written`` that generates texts for the first dev set's prompts."""
    options, delta, references = config.generate, config.delta, data.references
    search = {name: getattr(options, name) for name in ("new_tokens", "beams", "length_penalty", "early_stopping")}

    def write(trained: dict[str, Any], frozen: step.Frozen) -> Written:
        if references is None:
            return Written({}, [])
        trained, frozen = sharding.place(placed, (trained, frozen))
        updates = step.adapter(trained, frozen.supports, delta)
        params = tree.join(frozen.params, trained["params"])
        decoder = texts.Writer(model, params, updates, references.tokenizer, references.ends, references.pad)
        generated = texts.generate(decoder, references.prompts, batch_size=options.batch_size, **search)
        generated = [each.strip() for each in generated]
        prompts = [references.tokenizer.decode(ids) for ids in references.prompts]
        records = [
            {"prompt": prompt, "text": own, "references": given}
            for prompt, own, given in zip(prompts, generated, references.texts, strict=True)
        ]
        return Written(text.score(generated, references.texts), records)

    return write


def finite(metrics: Mapping[str, float]) -> bool:
    """Return whether all metrics are finite. Those of a model that gives not-a-number are not, and never the best."""
    return all(map(math.isfinite, metrics.values()))


def selection_score(task: Task) -> Callable[[dict[str, float]], float]:
    """Return the function from metrics to the score that selects the best evaluation; larger is better."""
    name = PROBLEMS[task.problem].best(task)
    sign = -1 if name == "loss" else 1
    return lambda metrics: sign * metrics[name] if name in metrics else -math.inf
