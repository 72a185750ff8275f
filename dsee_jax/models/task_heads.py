"""What a task puts on top of an encoder; the paths of its params are the same for every architecture."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.models.encoder import Config, init
from dsee_jax.models.layers import Dropout

HEAD = (r"(pooler|classifier|token_classifier|span)/.*",)
"""Paths that a task brings with it; created where a checkpoint lacks them."""

AXES = (
    (r"(pooler|classifier|token_classifier|span)/kernel", ("embed", None)),
    (r"(pooler|classifier|token_classifier|span)/bias", (None,)),
)
"""Their rows of an architecture's AXES."""


def dense(config: Config, features: int, name: str) -> nn.Dense:
    """Return an affine map that a head is made of."""
    return nn.Dense(features, dtype=jnp.dtype(config.dtype), kernel_init=init(config), name=name)


def read(task: str) -> int | None:
    """Return how many of the first positions the head of a task reads; None: all."""
    return 1 if task == "sequence-classification" else None


def head(
    config: Config,
    task: str,
    x: jax.Array,
    deterministic: bool,
    *,
    pool: Callable[[jax.Array], jax.Array],
    rate: float | None,
) -> jax.Array:
    """Return the outputs of a task, float32; its modules belong to the module that calls this.

    Args:
      config: of the model.
      task: sequence-classification, token-classification, question-answering (where an answer starts and ends) or features.
      x: the last hidden state (batch, length, width).
      deterministic: no dropout.
      pool: for sequence-classification, from the first position (batch, width) to the classifier's input.
      rate: of the dropout before a classifier; None: hidden_dropout_prob.

    Returns:
      (batch, num_labels), (batch, length, num_labels), (batch, length, 2) or ``x``.
    """
    if task == "features":
        return x.astype(jnp.float32)
    if task == "question-answering":
        return dense(config, 2, "span")(x).astype(jnp.float32)
    whole = task == "sequence-classification"
    x = Dropout(config.hidden_dropout_prob if rate is None else rate)(pool(x[:, 0]) if whole else x, deterministic)
    return dense(config, config.num_labels, "classifier" if whole else "token_classifier")(x).astype(jnp.float32)
