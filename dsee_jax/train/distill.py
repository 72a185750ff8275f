"""Distillation in a step: the student learns from the outputs of a teacher, and from the states inside of it (arXiv
1503.02531).

::

    loss = (1 - w) task + w (distance(student, teacher) + hidden H + attention A)

The keys of `dsee_jax.config.DistillConfig` are those of the equation. The outputs of the teacher come with the batch
(`dsee_jax.train.teachers`), or the step runs the teacher: where it needs its inner states, or all logits of a decoder.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import tree
from dsee_jax.config import Config, DistillConfig, model_task
from dsee_jax.models.architecture import Model
from dsee_jax.ops.joint import JointDense
from dsee_jax.train.losses import hidden_distance, relation_distance, top_k_distillation
from dsee_jax.train.problems import PROBLEMS
from dsee_jax.train.step import Objective, Teacher, predict
from dsee_jax.typing import Array, Masks

OUTPUTS, CLASSES = "teacher", "teacher_classes"
"""The names of the teacher's outputs in a batch: logits, or the probabilities of `top_k_log_probs` and their classes."""

_LAYER = r"(?:.*/)?layer_(\d+)"
_INNER = ("query", "key", "value")


def weights(config: DistillConfig, total: int) -> Callable[[int], np.float32]:
    """Return the weight of the distillation by step, for a stage of ``total`` steps."""
    if config.schedule == "constant":
        return lambda number: np.float32(config.weight)
    return lambda number: np.float32(config.weight * (1 - number / total))


def runs_teacher(config: Config) -> bool:
    """Return whether each step of a run that distils runs the teacher; else the batches have its outputs."""
    distill = config.train.distill
    return bool(distill.hidden or distill.attention or (model_task(config) == "causal-lm" and not distill.top_k))


def objective(config: Config, model: Model, task: str, kept: Masks, *, joined: bool) -> Objective:
    """Return the loss of a step with a teacher.

    Args:
      config: the run.
      model: the teacher, the model before pruning.
      task: the kind of the task, a name of `dsee_jax.train.problems.PROBLEMS`.
      kept: the units of the teacher that the student has (`dsee_jax.prune.units`); empty: all.
      joined: as in `dsee_jax.apply`.
    """
    problem, distill, run = PROBLEMS[task], config.train.distill, runs_teacher(config)
    inner = bool(distill.hidden or distill.attention)
    capture: dict[str, Any] = {"capture_intermediates": _captured(distill)} if inner else {}

    def loss(outputs: Callable[..., Any], batch: Mapping[str, Array], teacher: Teacher) -> jax.Array:
        logits, states = _parts(outputs(**capture), inner)
        labelled = jnp.sum(problem.losses(logits, batch) * batch["weights"])
        target, target_states = batch.get(OUTPUTS), {}
        if run:
            options: dict[str, Any] = {"joined": joined, "deterministic": True, **capture}
            target = predict(model, teacher.trained, teacher.frozen, batch, config.delta, **options)
            target, target_states = _parts(jax.lax.stop_gradient(target), inner)
        assert target is not None
        if CLASSES in batch:
            distances = top_k_distillation(logits, target, batch[CLASSES], distill.temperature)
        else:
            distances = problem.distance(logits, target, batch, distill.temperature)
        total = jnp.sum(distances * batch["weights"])
        # A row counts in the states as it does in the loss: once, or with each of its tokens.
        rows = jnp.sum(batch["weights"].reshape(len(batch["weights"]), -1), axis=1)
        mask = batch["attention_mask"]
        if distill.hidden:
            total += distill.hidden * jnp.sum(rows * _hidden(states, target_states, kept, mask))
        if distill.attention:
            count = model.config.head_size
            total += distill.attention * jnp.sum(rows * _relations(states, target_states, kept, mask, count))
        return (1 - teacher.weight) * labelled + teacher.weight * total

    return loss


def _captured(config: DistillConfig) -> Callable[[Any, str], bool]:
    """Return whether the loss reads the output of a method: that of a layer, or queries, keys and values."""

    def captured(module: Any, method: str) -> bool:
        layer = config.hidden and module.name is not None and re.fullmatch(_LAYER, module.name)
        projections = config.attention and isinstance(module, JointDense) and module.joint == _INNER
        return method == "__call__" and bool(layer or projections)

    return captured


def _parts(outputs: Any, inner: bool) -> tuple[Any, dict[str, Any]]:
    """Return the logits of a model, and its captured states by path."""
    if not inner:
        return outputs, {}
    logits, states = outputs
    calls = tree.flatten(states["intermediates"], lambda leaf: isinstance(leaf, tuple))
    return logits, {path: values[0] for path, values in calls.items()}


def _by_layer(states: Mapping[str, Any], end: str, kept: Masks) -> dict[int, Any]:
    """Return the states at the paths that end in ``end`` by the number of the layer, those of ``kept`` under new numbers."""
    matches = ((re.fullmatch(rf"{_LAYER}{end}/__call__", path), value) for path, value in states.items())
    every = {int(match[1]): value for match, value in matches if match}
    if "layers" not in kept:
        return every
    return {new: every[old] for new, old in enumerate(np.flatnonzero(kept["layers"]).tolist()) if old in every}


def _hidden(student: Mapping[str, Any], teacher: Mapping[str, Any], kept: Masks, mask: Array) -> jax.Array:
    """Return the distance of the hidden states of each row, mean over the layers of the student."""
    own, other = (
        {number: value[0] if isinstance(value, tuple) else value for number, value in layers.items()}
        for layers in (_by_layer(student, "", {}), _by_layer(teacher, "", kept))
    )
    width = np.flatnonzero(kept["hidden"]) if "hidden" in kept else slice(None)
    # The last layer of a classifier may compute the first position only.
    distances = [
        hidden_distance(x, other[number][:, : x.shape[1], width], mask[:, : x.shape[1]]) for number, x in own.items()
    ]
    return sum(distances[1:], distances[0]) / len(distances)


def _relations(
    student: Mapping[str, Any], teacher: Mapping[str, Any], kept: Masks, mask: Array, count: int
) -> jax.Array:
    """Return the distance of the relations of each row: of queries, of keys and of values, summed.

    They are those of the last layer of the student that has heads, 0 where none has. There are ``count`` relation heads.
    """
    own, other = _by_layer(student, "/attention", {}), _by_layer(teacher, "/attention", kept)
    if not own:
        return jnp.zeros(len(mask))
    last = max(own)
    distances = [relation_distance(x, y, mask, count) for x, y in zip(own[last], other[last], strict=True)]
    return sum(distances[1:], distances[0])
