"""Calibration of a run: the examples, and what scores read of the model on them.

All scores read the same examples: those of the first batches of the first epoch of training, at least ``prune.calibration``
examples, or all. Filler rows do not count. Scores of the gradients of weights read the examples one by one: of those of whole
batches, few and averaged, little can be told apart.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsee_jax import tree
from dsee_jax.data.batches import Batch, Batches, micro_batches, real_rows
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.deltas.fold import materialize
from dsee_jax.masks import apply as apply_masks
from dsee_jax.models.architecture import Model
from dsee_jax.prune import calibration, gradients, sequence
from dsee_jax.prune.scores import SCORES
from dsee_jax.train import sharding
from dsee_jax.train.problems import PROBLEMS
from dsee_jax.train.setup import Setup
from dsee_jax.train.step import adapter
from dsee_jax.typing import Array, Masks, Params


def batches(setup: Setup) -> list[Any]:
    """Return the calibration batches of a run, on its mesh, in micro-batches of at most ``data.batch_tokens`` tokens."""
    limit, mesh = setup.config.data.batch_tokens, setup.placed.mesh
    return [part for batch in _on_host(setup) for part in _parts(sharding.split(mesh, batch), limit)]


def _parts(batch: Mapping[str, Array], limit: int) -> Iterator[dict[str, Array]]:
    """Yield the micro-batches of a batch, of at most ``limit`` tokens; each takes every count-th row."""
    rows, length = batch["input_ids"].shape
    count = micro_batches(rows, length, limit)
    for number in range(count):
        yield {name: array[number::count] for name, array in batch.items()}


def _on_host(setup: Setup) -> Iterator[Batch]:
    """Yield whole batches until they hold ``prune.calibration`` examples: a partial batch may be among the first."""
    train, data, wanted = setup.config.train, setup.data, setup.config.prune.calibration
    source = Batches(data.train, train.batch_size, epochs=1, seed=train.seed, edges=data.edges)
    for number in range(len(source)):
        yield (batch := source[number])
        wanted -= int(real_rows(batch).sum())
        if wanted <= 0:
            return


def _examples(setup: Setup) -> Iterator[Any]:
    """Yield the examples of `batches` one by one, each on all devices, so that no result depends on the mesh."""
    for batch in _on_host(setup):
        for row in np.flatnonzero(real_rows(batch)):
            yield sharding.place(setup.placed, {name: array[row : row + 1] for name, array in batch.items()})


def current(setup: Setup, trained: dict[str, Any]) -> tuple[Params, Adapter | None]:
    """Return the params of the model as it is now, without its updates, and the updates."""
    params = tree.unflatten({**tree.flatten(setup.params), **tree.flatten(trained["params"])})
    return params, adapter(trained, setup.supports, setup.config.delta)


def evidence(setup: Setup, trained: dict[str, Any], masks: Masks) -> dict[str, Any]:
    """Return the `Evidence` that the score of a run reads of its examples, of the current model with ``masks``."""
    prune = setup.config.prune
    score = SCORES[prune.score]
    if not {"inputs", "gradients"} & {*score.reads}:
        return {}
    params, updates = current(setup, trained)
    params = materialize(apply_masks(params, masks), updates)
    if "inputs" in score.reads:
        return {"inputs": calibration.sizes(setup.model, params, batches(setup))}
    mean = loss(setup.model, setup.data.task.problem)
    options: Any = {"statistic": score.statistic}
    return {"gradients": gradients.measure(mean, params, setup.prunable, _examples(setup), **options)}


def layerwise(setup: Setup, trained: dict[str, Any], masks: Masks, sparsity: float) -> tuple[Masks, Params]:
    """Return the masks of `dsee_jax.prune.layerwise` by the config, and the params; earlier ``masks`` only shrink."""
    prune = setup.config.prune
    params, updates = current(setup, trained)
    groups: dict[str, Any] = {"n": prune.n, "m": prune.m} if prune.kind == "nm" else {"scope": prune.scope}
    with sharding.constrain_rows(setup.placed.mesh):
        return sequence.layerwise(
            *(setup.model, params, updates, prune.targets, batches(setup)),
            score=prune.score,
            sparsity=sparsity,
            keep=masks or None,
            losses=PROBLEMS[setup.data.task.problem].losses,
            behind=prune.calibrate == "layerwise",
            **groups,
        )


@functools.lru_cache(maxsize=4)
def loss(model: Model, problem: str) -> gradients.Loss:
    """Return the mean loss of a batch without dropout; one function for all draws of a run, so that it is compiled once."""
    losses = calibration.losses(model, PROBLEMS[problem].losses)
    return lambda params, batch: jnp.sum(losses(params, batch)) / jnp.sum(batch["weights"])
