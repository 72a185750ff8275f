"""The losses of tasks, and those of distillation, which compare a student with a teacher.

A loss of a task is a function of the outputs of a model and of a batch (`dsee_jax.data.batches`). It gives one number,
float32, for each entry of ``batch["weights"]``: of a row, or of a token. The teacher's outputs are constants for the caller.

::

    KL(p || q) = sum_i p_i (log p_i - log q_i),   p = softmax(teacher / T),   q = softmax(student / T)

A gradient through ``q`` shrinks as 1 / T^2, so the losses are multiplied by T^2 (arXiv 1503.02531, section 2).
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from dsee_jax.errors import InputError
from dsee_jax.typing import Array

LEAST = float(jnp.finfo(jnp.float32).min)
"""A logit of probability 0."""

Distance: TypeAlias = Callable[[Array, Array, Mapping[str, Array], float], jax.Array]
"""``(student logits, teacher logits, batch, temperature) -> losses``, with the shape of ``batch["weights"]``."""


def cross_entropy(logits: Array, batch: Mapping[str, Array]) -> jax.Array:
    """Return the cross-entropy in nats of logits (..., classes); ``labels`` (...) int32 are classes."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["labels"])


def span_cross_entropy(logits: Array, batch: Mapping[str, Array]) -> jax.Array:
    """Return the mean cross-entropy in nats of the first and the last token of an answer.

    ``logits`` (rows, length, 2) are those of each token to be the first and the last, ``labels`` (rows, 2) int32 the right
    ones. Padding is no choice.
    """
    real = batch["attention_mask"][:, :, None] != 0
    logits = jnp.where(real, logits.astype(jnp.float32), LEAST)
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


def distillation(student_logits: Array, teacher_logits: Array, temperature: float = 1.0) -> jax.Array:
    """Return T^2 KL(p || q) in nats, float32 (...), of logits (..., classes) and a temperature T > 0.

    p is the softmax of the teacher's logits / T, and q of the student's (Hinton et al. 2015, arXiv 1503.02531).
    """
    log_p, log_q = (jax.nn.log_softmax(_scaled(each, temperature)) for each in (teacher_logits, student_logits))
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _scaled(logits: Array, temperature: float) -> jax.Array:
    return jnp.asarray(logits, jnp.float32) / temperature


def binary_distillation(student_logits: Array, teacher_logits: Array, temperature: float = 1.0) -> jax.Array:
    """Return the mean over classes of T^2 KL(p || q) of each class and its absence; logits (rows, classes), result (rows,)."""
    # softmax of (x, 0) is the sigmoid of x.
    student, teacher = (jnp.stack([each, jnp.zeros_like(each)], axis=-1) for each in (student_logits, teacher_logits))
    return jnp.mean(distillation(student, teacher, temperature), axis=-1)


def span_distillation(student_logits: Array, teacher_logits: Array, mask: Array, temperature: float = 1.0) -> jax.Array:
    """Return the mean of T^2 KL(p || q) over the positions of the first and of the last token of an answer, (rows,).

    Logits are (rows, length, 2); ``mask`` (rows, length) is 0 at padding, which is no position.
    """
    real = mask[:, :, None] != 0
    student, teacher = (
        jnp.swapaxes(jnp.where(real, _scaled(logits, temperature), LEAST), 1, 2)
        for logits in (student_logits, teacher_logits)
    )
    return temperature**2 * jnp.mean(distillation(student, teacher), axis=-1)


def squared_distance(student_logits: Array, teacher_logits: Array) -> jax.Array:
    """Return the squared error to the teacher's predictions, both (rows, 1); result (rows,)."""
    return jnp.square(student_logits.astype(jnp.float32) - teacher_logits.astype(jnp.float32))[:, 0]


def top_k_log_probs(logits: Array, k: int, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Return the inputs of `top_k_distillation` for a teacher with logits (..., classes).

    Returns:
      The log probabilities at ``temperature`` of the ``k`` most probable classes, and of all others together (`LEAST` where
      there are none), float32 (..., k + 1); and these classes, int32 (..., k). ``k`` is at most the number of classes.
    """
    logits = _scaled(logits, temperature)
    _, ids = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return _grouped(logits, ids), ids


def top_k_distillation(
    student_logits: Array, teacher_log_probs: Array, teacher_ids: Array, temperature: float = 1.0
) -> jax.Array:
    """Return T^2 KL(p || q) where all classes but the teacher's most probable ones count as one; (...).

    At most the loss of `distillation`, and equal to it where all classes are given.

    Args:
      student_logits: (..., classes).
      teacher_log_probs: (..., k + 1), of `top_k_log_probs` at this temperature.
      teacher_ids: (..., k), of `top_k_log_probs`.
      temperature: T.
    """
    log_q = _grouped(_scaled(student_logits, temperature), teacher_ids)
    return temperature**2 * jnp.sum(jnp.exp(teacher_log_probs) * (teacher_log_probs - log_q), axis=-1)


def _grouped(logits: jax.Array, ids: Array) -> jax.Array:
    """Return the log probabilities of the classes ``ids`` (..., k), and of all other classes together: (..., k + 1)."""
    logits = jax.nn.log_softmax(logits)
    # One minus the sum of the others would have no right digit where the k classes have nearly all of the probability.
    others = jax.nn.logsumexp(jnp.put_along_axis(logits, ids, LEAST, axis=-1, inplace=False), axis=-1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(logits, ids, axis=-1), others], axis=-1)


def hidden_distance(student: Array, teacher: Array, mask: Array) -> jax.Array:
    """Return the mean squared error of normalised hidden states, over the entries and tokens of each row: (rows,), 0 to 4.

    Each state is normalised over its width by a layer norm without parameters, as in Minitron (arXiv 2407.14679, section 2):
    in a decoder the scale of the states grows with the depth, and the norm before each part of a layer undoes it.

    Args:
      student: (rows, length, width).
      teacher: (rows, length, width).
      mask: (rows, length), 0 at padding, which does not count.

    Raises:
      InputError: the widths differ.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"the hidden states of the student have the width {student.shape[-1]}, those of the teacher {teacher.shape[-1]}: "
            "set train.distill.hidden to 0"
        )
    difference = _normalised(student) - _normalised(teacher)
    return _mean(jnp.mean(jnp.square(difference), axis=-1), mask)


def _normalised(states: Array) -> jax.Array:
    wide = jnp.asarray(states, jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)


def relation_distance(student: Array, teacher: Array, mask: Array, count: int) -> jax.Array:
    """Return the KL divergence of the relations between tokens, mean over relation heads and tokens: (rows,) (MiniLMv2,
    arXiv 2012.15828).

    The vectors of all heads (all queries, keys or values of a layer) are divided into ``count`` relation heads, for any number
    of attention heads. With x (length, size) of one of them, a relation is ``softmax(x x^T / sqrt(size))``.

    Args:
      student: (rows, length, width), queries, keys or values.
      teacher: (rows, length, any width), the same ones.
      mask: (rows, length), 0 at padding, else the number of the text of each token; texts have no relations to each other.
      count: the number of relation heads; it divides both widths.
    """
    texts = mask[:, :, None] * jnp.ones_like(mask)[:, None, :]
    seen = ((texts == jnp.swapaxes(texts, 1, 2)) & (texts != 0))[:, None]

    def relations(vectors: Array) -> jax.Array:
        heads = vectors.astype(jnp.float32).reshape(*vectors.shape[:2], count, -1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", heads, heads) / heads.shape[-1] ** 0.5
        return jax.nn.log_softmax(jnp.where(seen, scores, LEAST))

    log_p, log_q = relations(teacher), relations(student)
    divergence = jnp.sum(jnp.where(seen, jnp.exp(log_p) * (log_p - log_q), 0), axis=-1)
    return _mean(jnp.mean(divergence, axis=1), mask)


def _mean(values: jax.Array, mask: Array) -> jax.Array:
    """Return the mean of each row of ``values`` (rows, length) over the positions where ``mask`` is not 0."""
    real = (mask != 0).astype(jnp.float32)
    return jnp.sum(values * real, axis=1) / jnp.sum(real, axis=1)
