"""AdamW with warm-up, linear decay and clipping, for the trained leaves only."""

from collections.abc import Callable, Container, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from dsee_jax.config import RatesConfig, TrainConfig

DECAYED = ("kernel", "embedding", "a", "b")
"""Last keys of the leaves with weight decay: matrices, but no biases, norms and sparse values."""


Schedule: TypeAlias = Callable[[int], float | np.float32]
"""The learning rate by step, of the host: those of optax compile and dispatch eight programs for each step."""


def schedule(peak: float, steps: int, warmup: float) -> Schedule:
    """Return the learning rate by step: a linear rise to ``peak`` in ``warmup * steps`` steps, then a linear fall to 0."""
    up = round(warmup * steps)
    return _joined([_linear(0.0, peak, up), _linear(peak, 0.0, max(steps - up, 1))], [up])


def restarted(peak: float, begins: Sequence[int], steps: int, warmup: float) -> Schedule:
    """Return the learning rate by step: `schedule` from each of the steps ``begins`` up to the next one.

    Learning rate rewinding (Renda et al. 2020, arXiv 2003.02389, section 3) to the start of the schedule: after each pruning
    the rate rises to ``peak`` in ``warmup`` of the round, and falls to 0 at its end.
    """
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], steps], strict=True)]
    return _joined([schedule(peak, length, warmup) for length in lengths], [*begins[1:]])


def warmup_constant(peak: float, steps: int, warmup: float) -> Schedule:
    """Return the learning rate by step: a linear rise to ``peak`` in ``warmup * steps`` steps, then constant."""
    up = round(warmup * steps)
    return _linear(0.0, peak, up) if up else lambda step: peak


def _linear(start: float, end: float, steps: int) -> Schedule:
    """Return the line from ``start`` at step 0 to ``end`` at ``steps``, constant after it; as by `optax.linear_schedule`."""

    def at(step: int) -> np.float32:
        left = np.float32(1) - np.float32(min(max(step, 0), steps)) / np.float32(max(steps, 1))
        return np.float32(start - end) * left + np.float32(end)

    return at


def _joined(schedules: Sequence[Schedule], begins: Sequence[int]) -> Schedule:
    """Return the first schedule up to the first of the steps ``begins``, then the next one, which counts from there."""

    def at(step: int) -> float | np.float32:
        number = sum(begin <= step for begin in begins)
        return schedules[number](step - begins[number - 1] if number else step)

    return at


def adamw(config: TrainConfig, head: Container[str] = ()) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019) after global-norm clipping (where ``config.clip``), without a learning rate.

    The caller subtracts the rate times the updates. The rate is thus an argument of the compiled step, and stages with
    different schedules share one program. Updates are multiplied by the factors ``config.rates`` last, as if each part had a
    learning rate of its own (LoRA+, Hayou et al. 2024, arXiv 2402.12354, section 4).

    Args:
      config: the section ``train`` of a run.
      head: the paths of the task head among the params.
    """
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    apart = [] if config.rates == RatesConfig() else [_scale_by_part(config.rates, head)]
    return optax.chain(*clip, optax.scale_by_adam(), decay, *apart)


def _scale_by_part(rates: RatesConfig, head: Container[str]) -> optax.GradientTransformation:
    """Return the transformation that multiplies the updates of each part of the trained values by its factor."""

    def factor(path: Any) -> float:
        part, *names = (entry.key for entry in path)
        if part == "deltas":
            return getattr(rates, names[-1])
        return rates.head if part == "params" and "/".join(names) in head else 1.0

    def scaled(updates: Any, _: Any) -> Any:
        return jax.tree.map_with_path(lambda path, update: factor(path) * update, updates)

    return optax.stateless(scaled)


def decay_mask(trained: Any) -> Any:
    """Return a tree of bools with the structure of ``trained``, empty branches included: True = weight decay."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key in DECAYED, trained)
