"""The losses of tasks, as functions of the outputs of a model and of a batch (`dsee_jax.data.batches`).

Each gives one loss, float32, for each entry of ``batch["weights"]``: of a row, or of a token.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsee_jax.typing import Array

Loss: TypeAlias = Callable[[Array, Mapping[str, Array]], jax.Array]
"""``(outputs, batch) -> losses``, with the shape of ``batch["weights"]``."""


def cross_entropy(logits: Array, batch: Mapping[str, Array]) -> jax.Array:
    """Return the cross-entropy in nats of logits (..., classes); ``labels`` (...) int32 are classes."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["labels"])


def span_cross_entropy(logits: Array, batch: Mapping[str, Array]) -> jax.Array:
    """Return the mean cross-entropy in nats of the first and the last token of an answer.

    ``logits`` (rows, length, 2) are those of each token to be the first and the last, ``labels`` (rows, 2) int32 the right
    ones. Padding is no choice.
    """
    real = batch["attention_mask"][:, :, None] != 0
    logits = jnp.where(real, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.swapaxes(logits, 1, 2), batch["labels"])
    return jnp.mean(losses, axis=-1)


def squared_error(logits: Array, batch: Mapping[str, Array]) -> jax.Array:
    """Return the squared error of predictions (rows, 1); ``labels`` (rows,) float32 are targets."""
    return jnp.square(logits.astype(jnp.float32)[:, 0] - batch["labels"])


def binary_cross_entropy(logits: Array, batch: Mapping[str, Array]) -> jax.Array:
    """Return the mean over classes of the binary cross-entropy in nats of logits (rows, classes).

    ``labels`` (rows, classes) float32 are 1 for the classes of a row, else 0.
    """
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), batch["labels"]), axis=-1)
