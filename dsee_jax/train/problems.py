"""The kinds of tasks: the loss of each, and how the outputs of a model become metrics. `PROBLEMS` is the table of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # which imports its submodules at their first use

from dsee_jax.data import Questions, Split, Task
from dsee_jax.data.tokens import Tokens
from dsee_jax.metrics import answers, classification, entities, multilabel
from dsee_jax.train.losses import (
    Distance,
    binary_cross_entropy,
    binary_distillation,
    cross_entropy,
    distillation,
    span_cross_entropy,
    span_distillation,
    squared_distance,
    squared_error,
)
from dsee_jax.typing import Array, Loss


class Problem(NamedTuple):
    """A kind of task."""

    losses: Loss
    summary: Callable[[Array, Mapping[str, Array]], Array]
    """``(outputs, batch) -> (rows, ...)``: the part of the outputs that metrics need. It is computed on the device."""
    score: Callable[[Task, Split, Tokens, Sequence[np.ndarray]], dict[str, float]]
    """``(task, examples, tokens, summaries) -> metrics`` of a dev set; a summary for each row of the tokens."""
    best: Callable[[Task], str]
    """The name of the metric that selects the best evaluation, the highest; of ``loss`` it is the lowest."""
    distance: Distance
    """The loss of distillation."""
    by_token: bool = False
    """Whether there are outputs for each token: (rows, length, ...), not (rows, ...)."""


def _outputs(outputs: Array, batch: Mapping[str, Array]) -> Array:
    return outputs


def _sums(logits: Array, batch: Mapping[str, Array]) -> jax.Array:
    """Return the sum of the losses of the tokens of each row, and their number: (rows, 2)."""
    losses, weights = cross_entropy(logits, batch), batch["weights"]
    return jnp.stack([jnp.sum(losses * weights, axis=1), jnp.sum(weights, axis=1)], axis=1)


def _perplexity(task: Task, examples: Split, tokens: Tokens, sums: Sequence[np.ndarray]) -> dict[str, float]:
    totals: np.ndarray = np.stack(sums).astype(np.float64).sum(0)
    loss = float(totals[0] / totals[1])
    # exp of a larger loss is infinite, which JSON cannot represent.
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _divergence(logits: Array, teacher: Array, batch: Mapping[str, Array], temperature: float) -> jax.Array:
    return distillation(logits, teacher, temperature)


def _tags(logits: Array, batch: Mapping[str, Array]) -> jax.Array:
    """Return the most probable tag and the loss of each token: (rows, length, 2)."""
    return jnp.stack([jnp.argmax(logits, axis=-1).astype(jnp.float32), cross_entropy(logits, batch)], axis=-1)


def _tagged(task: Task, examples: Split, tokens: Tokens, found: Sequence[np.ndarray]) -> dict[str, float]:
    flat = np.concatenate([row[:length] for row, length in zip(found, tokens.lengths, strict=True)])
    given = np.asarray(tokens.weights) > 0
    counts = np.add.reduceat(given, tokens.offsets[:-1], dtype=np.int64)
    tags, labels = (np.split(each[given], np.cumsum(counts)[:-1]) for each in (flat[:, 0].astype(int), tokens.labels))
    scores = entities.score(tags, labels, task.labels)
    loss = float(np.mean(flat[given, 1], dtype=np.float64))
    # The most probable of logits that are not numbers would be the first tag.
    return (scores if math.isfinite(loss) else dict.fromkeys(scores, math.nan)) | {"loss": loss}


def _classes(task: Task, examples: Split, tokens: Tokens, logits: Sequence[np.ndarray]) -> dict[str, float]:
    return classification.score(task.glue, np.stack(logits), tokens.labels, regression=task.regression)


def _best_of_glue(task: Task) -> str:
    return next(iter(classification.of_task(task.glue, regression=task.regression)))


def _answered(task: Task, examples: Split, tokens: Tokens, logits: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the scores of the best span of each question over the windows of its text.

    If some questions of the training set have no answer, the answer is "" where the first token of each row, which stands for
    none, has a higher sum of logits than the best span: a probability of no answer above one half, of the two.
    """
    assert isinstance(examples, Questions)
    assert isinstance(task.train, Questions)
    assert tokens.windows
    best = [(-math.inf, "")] * len(examples.question)
    none = np.full(len(examples.question), -math.inf if all(task.train.answers) else math.inf)
    losses = []
    for row, question in enumerate(tokens.windows.questions):
        part = slice(tokens.offsets[row], tokens.offsets[row + 1])
        own, spans = np.asarray(logits[row][: tokens.lengths[row]], np.float64), tokens.windows.spans[part]
        losses.append(-np.mean(scipy.special.log_softmax(own, axis=0)[tokens.labels[row], (0, 1)]))
        (inside,) = np.nonzero(spans[:, 0] >= 0)
        value, first, last = answers.best_span(own[inside, 0], own[inside, 1])
        begin, end = spans[inside[first], 0], spans[inside[last], 1]
        best[question] = max(best[question], (value, examples.context[question][begin:end]), key=lambda each: each[0])
        none[question] = min(none[question], own[0].sum())
    given = ["" if without > value else text for (value, text), without in zip(best, none, strict=True)]
    scores = answers.score(given, examples.answers)
    loss = float(np.mean(losses))
    # There is no best of logits that are not numbers.
    return (scores if math.isfinite(loss) else dict.fromkeys(scores, math.nan)) | {"loss": loss}


PROBLEMS: dict[str, Problem] = {
    "single_label_classification": Problem(cross_entropy, _outputs, _classes, _best_of_glue, _divergence),
    "regression": Problem(
        *(squared_error, _outputs, _classes, _best_of_glue),
        lambda logits, teacher, batch, temperature: squared_distance(logits, teacher),
    ),
    "multi_label_classification": Problem(
        binary_cross_entropy,
        _outputs,
        lambda task, examples, tokens, logits: multilabel.score(np.stack(logits), tokens.labels),
        lambda task: "f1_micro",
        lambda logits, teacher, batch, temperature: binary_distillation(logits, teacher, temperature),
    ),
    "token-classification": Problem(
        *(cross_entropy, _tags, _tagged),
        lambda task: "f1" if entities.is_iob(task.labels) else "accuracy",
        _divergence,
        by_token=True,
    ),
    "question-answering": Problem(
        *(span_cross_entropy, _outputs, _answered),
        lambda task: "f1",
        lambda logits, teacher, batch, temperature: span_distillation(
            logits, teacher, batch["attention_mask"], temperature
        ),
        by_token=True,
    ),
    "causal-lm": Problem(cross_entropy, _sums, _perplexity, lambda task: "loss", _divergence, by_token=True),
}
"""The kinds of tasks by `dsee_jax.data.Task.problem`."""
