"""The heads of tasks on top of an encoder. Their params have the same paths in every architecture."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.models.architecture import Axes
from dsee_jax.models.encoder import Config
from dsee_jax.models.layers import Dropout, init

TASKS = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "features": "Model",
}
"""Task -> the end of the name of Hugging Face's class."""

HEAD = (r"(pooler|classifier|token_classifier|span)/.*",)
"""The paths of the task heads."""

AXES: Axes = (
    (r"pooler/kernel", ("embed", "embed")),
    (r"pooler/bias", ("embed",)),
    (r"(classifier|token_classifier|span)/kernel", ("embed", None)),
    (r"(classifier|token_classifier|span)/bias", (None,)),
)
"""The rows of `Architecture.axes` for the heads. A pooler is as wide as the hidden state, and its outputs are cut with it."""


def dense(config: Config, features: int, name: str) -> nn.Dense:
    """Return an affine map of a head."""
    return nn.Dense(features, dtype=jnp.dtype(config.dtype), kernel_init=init(config), name=name)


def read(task: str) -> int | None:
    """Return the number of leading positions that the head of a task reads; None: all."""
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
    """Return the outputs of a task, float32; the modules belong to the calling module.

    Args:
      config: of the model.
      task: sequence-classification, token-classification, question-answering (start and end of the answer) or features.
      x: the last hidden state (batch, length, width).
      deterministic: no dropout.
      pool: for sequence-classification, maps the first position (batch, width) to the classifier's input.
      rate: the dropout rate before a classifier; None: hidden_dropout_prob.

    Returns:
      (batch, num_labels), (batch, length, num_labels), (batch, length, 2) or ``x``.
    """
    if task == "features":
        return x.astype(jnp.float32)
    if task == "question-answering":
        return dense(config, 2, "span")(x).astype(jnp.float32)
    pooled = task == "sequence-classification"
    x = Dropout(config.hidden_dropout_prob if rate is None else rate)(pool(x[:, 0]) if pooled else x, deterministic)
    return dense(config, config.num_labels, "classifier" if pooled else "token_classifier")(x).astype(jnp.float32)
