"""The losses of tasks, by literals."""

import jax.numpy as jnp
import numpy as np

from dsee_jax.train import losses


def test_loss_literals():
    """-log softmax and the squared error, in float32 for any dtype of logits."""
    logits = jnp.array([[0.0, np.log(3)], [0.0, 0.0]], jnp.bfloat16)
    values = losses.cross_entropy(logits, {"labels": np.array([1, 0])})
    np.testing.assert_allclose(values, [np.log(4 / 3), np.log(2)], rtol=5e-3)
    assert values.dtype == jnp.float32
    values = losses.squared_error(jnp.array([[1.5], [2.0]]), {"labels": np.array([1.0, 4.0])})
    np.testing.assert_allclose(values, [0.25, 4])


def test_binary_cross_entropy_is_the_mean_over_labels():
    """Of a right label of probability 3/4 and a wrong one of probability 1/2; as torch's BCEWithLogitsLoss."""
    logits = jnp.array([[np.log(3), 0.0]], jnp.bfloat16)
    values = losses.binary_cross_entropy(logits, {"labels": np.array([[1.0, 0.0]], np.float32)})
    np.testing.assert_allclose(values, [(np.log(4 / 3) + np.log(2)) / 2], rtol=5e-3)
    assert values.dtype == jnp.float32


def test_span_cross_entropy_leaves_padding_out():
    """The mean of the first and the last token of an answer, over the two tokens that are no padding."""
    logits = jnp.array([[[0.0, 0.0], [np.log(3), 0.0], [9.0, 9.0]]], jnp.float32)
    batch = {"labels": np.array([[1, 0]]), "attention_mask": np.array([[1, 1, 0]])}
    np.testing.assert_allclose(losses.span_cross_entropy(logits, batch), [(np.log(4 / 3) + np.log(2)) / 2], rtol=1e-6)
