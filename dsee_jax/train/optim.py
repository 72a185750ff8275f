"""AdamW with warm-up, linear decay and clipping, for what is trained and nothing else."""

from typing import Any

import jax
import optax

from dsee_jax.config import TrainConfig

DECAYED = ("kernel", "embedding", "a", "b")
"""Last keys of the leaves that weight decay acts on: matrices, not biases, norms and sparse values."""


def schedule(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Return the learning rate by step: up linearly over ``warmup * steps`` steps, then down linearly to 0 at ``steps``."""
    up = round(warmup * steps)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, up), optax.linear_schedule(peak, 0.0, max(steps - up, 1))], [up]
    )


def warmed(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Return the learning rate by step: up linearly over ``warmup * steps`` steps, and no further down."""
    return optax.linear_schedule(0.0, peak, round(warmup * steps)) if round(warmup * steps) else lambda _: peak


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019) behind global-norm clipping (when ``config.clip``), for a learning rate of -1.

    The caller multiplies the updates by minus the rate: the rate is then an argument of the compiled step, and stages with
    different schedules share one program.
    """
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*clip, optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay, decay_mask))


def decay_mask(trained: Any) -> Any:
    """Return a tree of bools like ``trained``, empty branches included: True where weight decay acts."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key in DECAYED, trained)
