"""The optimiser step and the forward pass of a run, as pure functions for ``jit``.

The trained values are one tree: ``deltas`` (the updates), ``params`` (the task head, or every weight in full fine-tuning)
and, in a search for a ticket, ``coefficients`` (`dsee_jax.prune.earlybert`). Only this tree has gradients and optimiser
state; the other params are constants.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsee_jax import tree
from dsee_jax.config import DeltaConfig
from dsee_jax.deltas import attach
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.masks import apply as apply_masks
from dsee_jax.models import INPUTS
from dsee_jax.prune import earlybert
from dsee_jax.train.losses import cross_entropy
from dsee_jax.typing import Array, Cuts, Key, Loss, Masks, Module, Params, Supports


class State(NamedTuple):
    """The values that a step updates."""

    step: jax.Array  # shape=(), dtype=int32; steps done in this stage
    trained: dict[str, Any]  # {"deltas": Deltas, "params": Params, ...}
    optimizer: optax.OptState


class Frozen(NamedTuple):
    """The constants of a step."""

    params: Params  # the params that are not trained; pruned entries are 0
    supports: Supports
    masks: Masks  # of trained params only; the constants are masked once, when the masks change


class Teacher(NamedTuple):
    """The part of a teacher in a step; see `dsee_jax.train.distill`."""

    weight: Any  # of the distillation in this step, in [0, 1]
    trained: Any = None  # of the teacher where the step runs it; None: the batch has its outputs
    frozen: Any = None  # the `Frozen` of the teacher, likewise


Objective: TypeAlias = Callable[[Callable[..., Any], Mapping[str, Array], Teacher], jax.Array]
"""``(outputs, batch, teacher) -> loss``, summed over the batch; ``outputs`` runs the student with options of `predict`."""


def adapter(trained: Mapping[str, Any], supports: Supports, delta: DeltaConfig) -> Adapter | None:
    """Return the updates of a run as an adapter; None where there are none."""
    if not trained["deltas"]:
        return None
    return Adapter(trained["deltas"], supports, delta.scale, delta.scale_sparse)


def predict(
    model: Module,
    trained: Mapping[str, Any],
    frozen: Frozen,
    batch: Any,
    delta: DeltaConfig,
    *,
    cuts: Cuts | None = None,
    **options: Any,
) -> Any:
    """Return the logits (batch, classes) of the model with its updates, and its coefficients where ``trained`` has any.

    ``cuts`` is ``models.cuts(model)``; coefficients without it raise `InputError`. ``options`` are those of
    `dsee_jax.apply`.
    """
    with earlybert.attached(trained.get("coefficients", {}), cuts or {}):
        return attach.apply(
            model,
            tree.join(frozen.params, trained["params"]),
            adapter(trained, frozen.supports, delta),
            {name: batch[name] for name in INPUTS},
            **options,
        )


def train_step(
    model: Module,
    optimizer: optax.GradientTransformation,
    delta: DeltaConfig,
    *,
    losses: Loss = cross_entropy,
    parts: Callable[[Mapping[str, Array]], int] = lambda batch: 1,
    cuts: Cuts | None = None,
    penalty: float = 0.0,
    joined: bool = True,
    objective: Objective | None = None,
) -> Callable[..., tuple[State, jax.Array]]:
    """Return the pure function ``(state, frozen, batch, key, rate, teacher=None) -> (state, loss)``.

    The loss is the mean over the batch, weighted by ``weights`` (0 for filler rows). The dropout key is ``key`` folded with
    the step and the number of the micro-batch.

    In a search for a ticket ``trained`` has ``coefficients`` c, and the step minimises the loss plus ``penalty`` times the
    sum of ``|c|``. The returned loss excludes the penalty, so that losses of different stages are comparable. With a teacher
    it is the one of the ``objective``.

    Args:
      model: a Linen module.
      optimizer: as from `optim.adamw`, without a learning rate.
      delta: the section ``delta`` of a run.
      losses: the loss of each row, or of each token (`dsee_jax.train.losses`).
      parts: gives the number of equal micro-batches of a batch; gradients are summed, so the result is independent of the
        number, except for dropout.
      cuts: ``models.cuts(model)``, for coefficients.
      penalty: the weight of the L1 penalty on coefficients.
      joined: as in `dsee_jax.apply`.
      objective: the loss of a step with a teacher, in place of ``losses``.
    """

    def summed(
        trained: dict[str, Any], frozen: Frozen, batch: Mapping[str, Array], key: Key, teacher: Teacher | None
    ) -> jax.Array:
        def outputs(**more: Any) -> Any:
            options = {"cuts": cuts, "joined": joined, "deterministic": False, "rngs": {"dropout": key}}
            return predict(model, trained, frozen, batch, delta, **options, **more)

        if objective is not None and teacher is not None:
            return objective(outputs, batch, teacher)
        return jnp.sum(losses(outputs(), batch) * batch["weights"])

    def step(
        state: State, frozen: Frozen, batch: Mapping[str, Array], key: Key, rate: Array, teacher: Teacher | None = None
    ) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(key, state.step)
        count = parts(batch)
        if count == 1:
            keys = jax.random.fold_in(key, 0)
            total, gradient = jax.value_and_grad(summed)(state.trained, frozen, batch, keys, teacher)
        else:
            # A micro-batch takes every count-th row, so that it has rows on every device.
            split = jax.tree.map(
                lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), dict(batch)
            )

            def add(carry: Any, part: Any) -> tuple[Any, None]:
                micro, number = part
                keys = jax.random.fold_in(key, number)
                sums = jax.value_and_grad(summed)(state.trained, frozen, micro, keys, teacher)
                return jax.tree.map(jnp.add, carry, sums), None

            start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.trained))
            (total, gradient), _ = jax.lax.scan(add, start, (split, jnp.arange(count)))
        rows = jnp.sum(batch["weights"])
        gradient = jax.tree.map(lambda g: g / rows, gradient)
        if penalty:
            pull = jax.grad(earlybert.penalty)(state.trained["coefficients"])
            pulled = jax.tree.map(lambda g, p: g + penalty * p, gradient["coefficients"], pull)
            gradient = gradient | {"coefficients": pulled}
        # optax mixes types, also where JAX_NUMPY_DTYPE_PROMOTION is strict.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        trained: Any = jax.tree.map(lambda w, u: w - rate * u, state.trained, updates)
        if frozen.masks:
            trained = trained | {"params": apply_masks(trained["params"], frozen.masks)}
        return State(state.step + 1, trained, optimizer_state), total / rows

    return step
