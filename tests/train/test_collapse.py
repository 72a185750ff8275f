"""A run that learned nothing says so in one line; one that learned something says nothing."""

import numpy as np
import pytest

import runs
from dsee_jax.config import TrainConfig
from dsee_jax.data import Examples, Task
from dsee_jax.metrics import classification
from dsee_jax.train import collapse, evaluation

LOSSES = {"lowest": 0.6, "before": 0.7}


def task(labels, glue="", classes=("no", "yes")):
    examples = Examples(["x"] * len(labels), None, labels)
    return Task("t", () if labels.dtype == np.float32 else classes, examples, {"dev": examples}, glue=glue)


def finding(labels, predictions, glue="", **losses):
    """Return the finding of predictions, classes or numbers."""
    regression = labels.dtype == np.float32
    outputs = predictions[:, None] if regression else np.eye(3)[predictions]
    scores = classification.score(glue, outputs, labels, regression=regression)
    return collapse.finding(task(labels, glue, ("a", "b", "c")), labels, scores, **LOSSES | losses)


@pytest.mark.parametrize("glue", ["", "mrpc", "cola"])
@pytest.mark.parametrize("answer", [0, 1])
def test_one_class_for_all_examples_is_found(glue, answer):
    labels = np.array([0, 0, 0, 1, 1])
    one_class = "the scores on the dev set are those of one class for all examples"
    assert finding(labels, np.full(5, answer), glue) == one_class
    assert finding(labels, np.array([0, 0, 0, 0, 1]), glue) == ""


def test_scores_of_one_class_are_all_of_them():
    """As many right answers as by one class, and another F1."""
    assert finding(np.array([1, 1, 1, 0]), np.array([1, 1, 0, 0]), "mrpc") == ""


def test_one_class_is_right_where_the_labels_are_of_one():
    assert finding(np.zeros(3, int), np.zeros(3, int)) == ""


def test_numbers_that_say_nothing_of_the_labels_are_found():
    labels = np.linspace(0, 5, 100, dtype=np.float32)
    nothing = "the predictions for the dev set explain less than 1% of the variance of the labels"
    assert finding(labels, np.full(100, 2.5)) == nothing
    assert finding(labels, np.cos(50 * labels)) == nothing
    assert finding(labels, labels + 3 * np.cos(50 * labels)) == ""


def test_loss_that_never_fell_is_found():
    labels = np.array([0, 1])
    assert finding(labels, labels, lowest=0.7) == (
        "the loss on the dev set is never below 0.7, and was 0.7 before any training"
    )
    assert finding(labels, labels, lowest=0.69) == ""


def test_line_names_the_learning_rate_of_its_stage():
    train = TrainConfig(learning_rate=0.5, retune_learning_rate=0.25)
    assert "try a train.learning_rate below 0.5, a longer train.warmup" in collapse.warning("tune", train, "x")
    assert "stage retune: x; " in (line := collapse.warning("retune", train, "x"))
    assert "try a train.retune_learning_rate below 0.25" in line
    assert "try a train.learning_rate below 0.5" in collapse.warning("retune", TrainConfig(learning_rate=0.5), "x")


def test_run_says_which_stage_learned_nothing(tmp_path, monkeypatch, caplog):
    """The first stage has its lowest loss at an evaluation that is not its best, and the second has none below that before."""
    made = iter([(0.5, 0.7), (0.9, 0.8), (0.8, 0.6), (0.5, 0.75), (0.9, 0.8), (0.7, 0.71)])

    def evaluate(trained, frozen):
        accuracy, loss = next(made)
        return {"accuracy": accuracy, "loss": loss}

    monkeypatch.setattr(evaluation, "evaluator", lambda *args: evaluate)
    runs.run(tmp_path, train__eval_every=0.5, train__epochs=0.4, train__retune_epochs=0.4)
    lines = [line for line in caplog.messages if "collapsed" in line]
    assert lines == [
        "stage retune: the loss on the dev set is never below 0.71, and was 0.7 before any training; the training collapsed, "
        "or was too short: with another output_dir, try a train.learning_rate below 0.01, a longer train.warmup, or more "
        "epochs"
    ]
