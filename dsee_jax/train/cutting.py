"""The units that a structured pruning of a run keeps: by a score, in fixed numbers or up to a target."""

from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax import models
from dsee_jax.deltas.fold import materialize
from dsee_jax.prune import budget, calibration, selection, sensitivity, units
from dsee_jax.train import calibrated, sharding, target
from dsee_jax.train.problems import PROBLEMS
from dsee_jax.train.setup import Setup, keys
from dsee_jax.typing import Masks, Params, Tree


def choose(setup: Setup, trained: dict[str, Any]) -> Masks:
    """Return the kept units (`dsee_jax.prune.units`) of the current model, whose trained values are ``trained``."""
    prune = setup.config.prune
    params, updates = calibrated.current(setup, trained)
    scored: dict[str, Any] = {"score": prune.score, "key": keys(setup.config.train.seed)["prune"]}
    if prune.score == "TAYLOR":
        scored["score"] = _sensitivity(setup, materialize(params, updates))
    if not prune.target.kind:
        options = {name: getattr(prune, name) for name in ("heads", "neurons", "layers", "hidden", "scope")}
        return selection.select(setup.model, params, updates, **options, **scored)
    spent = target.of_setup(setup)
    if not isinstance(scored["score"], str):
        return target.choose(setup, scored["score"], spent)
    by_kind = units.by_kind(params, updates, models.cuts(setup.model), **scored)
    scores: dict[str, Any] = {**budget.balanced(by_kind, spent)}
    if prune.target.hidden:
        hidden = selection.hidden_scores(setup.model, params, updates, **scored)
        scores["hidden"] = target.balanced(setup, hidden, spent)
    return target.choose(setup, scores, spent)


def _sensitivity(setup: Setup, params: Params) -> Tree:
    """Return the TAYLOR scores of all units, over the calibration examples."""
    losses = calibration.losses(setup.model, PROBLEMS[setup.data.task.problem].losses)

    def of_rows(params: Params, batch: Any) -> jax.Array:
        with sharding.constrain_rows(setup.placed.mesh):
            each = losses(params, batch)
        return jnp.sum(each, axis=tuple(range(1, each.ndim)))

    prune = setup.config.prune
    hidden = models.hidden_axes(setup.model) if prune.hidden or prune.target.hidden else None
    return sensitivity.taylor(of_rows, params, models.cuts(setup.model), calibrated.batches(setup), hidden=hidden)
