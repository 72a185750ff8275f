"""The losses of tasks and of distillation, by literals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax.errors import InputError
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


def test_distillation_literals():
    """KL of (3/4, 1/4) to (1/2, 1/2) is 3/4 log 3/2 + 1/4 log 1/2; T = 2 halves the logits and multiplies by 4."""
    teacher, student = jnp.array([[np.log(3), 0.0]]), jnp.zeros((1, 2), jnp.bfloat16)
    divergence = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    value = losses.distillation(student, teacher)
    np.testing.assert_allclose(value, [divergence], rtol=1e-6)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(losses.distillation(student, 2 * teacher, 2.0), [4 * divergence], rtol=1e-6)
    # Of each class and its absence: the second class is equal.
    both = losses.binary_distillation(jnp.array([[0.0, 1.0]]), jnp.array([[2 * np.log(3), 1.0]]), 2.0)
    np.testing.assert_allclose(both, [4 * divergence / 2], rtol=1e-6)
    np.testing.assert_allclose(losses.squared_distance(jnp.array([[1.5]]), jnp.array([[1.0]])), [0.25])


def test_span_distillation_leaves_padding_out():
    """Positions of the first token: (3/4, 1/4) to (1/2, 1/2); of the last token: equal."""
    teacher = jnp.array([[[np.log(3), 5.0], [0.0, 5.0], [9.0, 9.0]]])
    value = losses.span_distillation(jnp.zeros((1, 3, 2)), teacher, jnp.array([[1, 1, 0]]))
    np.testing.assert_allclose(value, [(0.75 * np.log(1.5) + 0.25 * np.log(0.5)) / 2], rtol=1e-6)
    cold = losses.span_distillation(jnp.zeros((1, 3, 2)), teacher / 2, jnp.array([[1, 1, 0]]), 0.5)
    np.testing.assert_allclose(cold, value / 4, rtol=1e-6)


def test_top_k_distillation_counts_the_other_classes_as_one():
    """The teacher has 1/2, 1/4, 1/8, 1/8, the student 1/4 each: with the first class alone 1/2 log 2 + 1/2 log 2/3."""
    teacher, student = jnp.log(jnp.array([[2.0, 4.0, 1.0, 1.0]])), jnp.zeros((1, 4))
    log_probs, ids = losses.top_k_log_probs(teacher, 1)
    np.testing.assert_allclose(log_probs, np.log([[0.5, 0.5]]), rtol=1e-6)
    assert ids.tolist() == [[1]]
    value = losses.top_k_distillation(student, log_probs, ids)
    np.testing.assert_allclose(value, [0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)], rtol=1e-6)


def test_all_classes_of_top_k_give_the_whole_divergence():
    """Also where more are asked for than there are."""
    logits = np.random.default_rng(0).normal(0, 3, (2, 3, 4)).astype(np.float32)
    log_probs, ids = losses.top_k_log_probs(logits[0], 9, 2.0)

    def grouped(student):
        return jnp.sum(losses.top_k_distillation(student, log_probs, ids, 2.0))

    def whole(student):
        return jnp.sum(losses.distillation(student, logits[0], 2.0))

    for one, other in zip(jax.value_and_grad(grouped)(logits[1]), jax.value_and_grad(whole)(logits[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_hidden_distance_ignores_scale_and_padding():
    """0 for states that differ in scale and offset; 4 for opposite ones; the third token is padding."""
    teacher = np.random.default_rng(0).normal(0, 1, (1, 3, 8)).astype(np.float32)
    student, mask = 5 * teacher + 1, np.array([[1, 1, 0]])
    student[:, 2] = 7
    np.testing.assert_allclose(losses.hidden_distance(student, teacher, mask), [0], atol=1e-6)
    np.testing.assert_allclose(losses.hidden_distance(-student, teacher, mask), [4], rtol=1e-4)
    with pytest.raises(InputError, match=r"width 6, those of the teacher 8: set train.distill.hidden to 0"):
        losses.hidden_distance(student[..., :6], teacher, mask)


def test_relation_distance_literal():
    """One head of size 1, teacher (t, 0), student zeros: the first token relates by softmax(t^2, 0), the second evenly."""
    t = float(np.sqrt(np.log(3)))
    teacher = np.array([[[t], [0.0], [9.0]]], np.float32)
    student, mask = np.zeros((1, 3, 1), np.float32), np.array([[1, 1, 0]])
    value = losses.relation_distance(student, teacher, mask, 1)
    np.testing.assert_allclose(value, [(0.75 * np.log(1.5) + 0.25 * np.log(0.5)) / 2], rtol=1e-5)


def test_relation_distance_takes_any_number_of_heads_and_separates_texts():
    """Two heads of size 4 against three; a second text in the row changes nothing in the relations of the first."""
    random = np.random.default_rng(0)
    teacher, student = (random.normal(0, 1, (1, 4, width)).astype(np.float32) for width in (12, 8))
    alone = losses.relation_distance(student[:, :2], teacher[:, :2], np.array([[1, 1]]), 4)
    other = losses.relation_distance(student[:, 2:], teacher[:, 2:], np.array([[1, 1]]), 4)
    packed = losses.relation_distance(student, teacher, np.array([[1, 1, 2, 2]]), 4)
    np.testing.assert_allclose(packed, (alone + other) / 2, rtol=1e-5)
    assert float(alone[0]) > 0


DISTANCES = {
    "classes": losses.distillation,
    "labels": losses.binary_distillation,
    "numbers": lambda student, teacher: losses.squared_distance(student, teacher),
    "spans": lambda student, teacher: losses.span_distillation(student, teacher, jnp.ones(student.shape[:2])),
    "top_k": lambda student, teacher: losses.top_k_distillation(student, *losses.top_k_log_probs(teacher, 2)),
    "hidden": lambda student, teacher: losses.hidden_distance(student, teacher, jnp.ones(student.shape[:2])),
    "attention": lambda student, teacher: losses.relation_distance(student, teacher, jnp.ones(student.shape[:2]), 2),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", DISTANCES)
def test_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    inner = name in ("spans", "hidden", "attention")
    teacher = np.random.default_rng(0).normal(0, 2, (2, 3, 4) if inner else (3, 4)).astype(np.float32)
    value, gradient = jax.value_and_grad(lambda student: jnp.sum(DISTANCES[name](student, teacher)))(
        jnp.asarray(teacher)
    )
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
