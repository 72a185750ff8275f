"""The compiled functions of a run: the training step over a mesh, evaluation, and generation for the text metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from dsee_jax import models
from dsee_jax.config import Config
from dsee_jax.data.batches import micro_batches
from dsee_jax.models.architecture import Model
from dsee_jax.train import distill, evaluation, optim, sharding
from dsee_jax.train.problems import PROBLEMS
from dsee_jax.train.setup import Setup
from dsee_jax.train.step import State, train_step

Step = Callable[..., tuple[State, jax.Array]]
"""``(state, frozen, batch, key, rate, teacher=None) -> (state, loss)``, see `dsee_jax.train.step.train_step`."""


class Programs(NamedTuple):
    """The jitted functions of one model, shared by all stages that train this model, whatever its weights."""

    optimizer: optax.GradientTransformation
    step: Step
    evaluate: evaluation.Evaluate
    write: evaluation.Write


def sharded_step(
    model: Model, optimizer: optax.GradientTransformation, config: Config, placed: sharding.Placement, **options: Any
) -> Step:
    """Return the training step of a config over the mesh of ``placed``, not yet compiled.

    ``options`` are those of `dsee_jax.train.step.train_step`.
    """

    def parts(batch: Any) -> int:
        rows, length = batch["input_ids"].shape
        return micro_batches(rows, length, config.data.batch_tokens)

    joined = placed.mesh.shape["tensor"] == 1
    one = train_step(model, optimizer, config.delta, parts=parts, joined=joined, **options)

    def step(state: State, *args: Any) -> tuple[State, jax.Array]:
        with sharding.constrain_rows(placed.mesh):
            new, loss = one(state, *args)
        # The new state keeps the shardings of the old one.
        return jax.lax.with_sharding_constraint(new, sharding.shardings(placed, new)), loss

    return step


def distilling(programs: Programs, setup: Setup, teacher: Model) -> Programs:
    """Return the programs of a run whose step has a teacher, the model before pruning."""
    joined = setup.placed.mesh.shape["tensor"] == 1
    objective = distill.objective(setup.config, teacher, setup.data.task.problem, setup.kept, joined=joined)
    one = sharded_step(setup.model, programs.optimizer, setup.config, setup.placed, objective=objective)
    return programs._replace(step=jax.jit(one, donate_argnums=0))


def make_programs(setup: Setup, *, searching: bool = False) -> Programs:
    """Return the jitted functions of a run.

    Args:
      setup: the run; its model decides the programs.
      searching: the step also trains the coefficients of heads and neurons, under their penalty.
    """
    config, optimizer = setup.config, optim.adamw(setup.config.train, setup.head)
    options = {"cuts": models.cuts(setup.model), "penalty": config.prune.penalty} if searching else {}
    losses = PROBLEMS[setup.data.task.problem].losses
    step = sharded_step(setup.model, optimizer, config, setup.placed, losses=losses, **options)
    apart = (setup.model, config, setup.data, setup.placed)
    return Programs(optimizer, jax.jit(step, donate_argnums=0), evaluation.evaluator(*apart), evaluation.writer(*apart))
