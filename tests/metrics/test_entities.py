"""Entities of IOB2 tags, and their scores, by literals."""

import numpy as np
import pytest

from dsee_jax.errors import InputError
from dsee_jax.metrics import entities


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-A I-A O", {("A", 1, 3)}),
        ("B-A B-A I-A", {("A", 0, 1), ("A", 1, 3)}),
        ("B-A I-B I-B", {("A", 0, 1), ("B", 1, 3)}),
        ("O I-A I-A", {("A", 1, 3)}),
        ("I-A O I-A", {("A", 0, 1), ("A", 2, 3)}),
        ("B-A-1 I-A-1", {("A-1", 0, 2)}),
        ("O O", set()),
    ],
)
def test_entities_follow_conlleval(tags, expected):
    """An I- of another type, or after O, begins an entity; a B- always does."""
    assert entities.entities(tags.split()) == expected


def test_entity_is_right_only_as_a_whole():
    """Two of three predicted entities are right, and two of four of the text; boundaries are of each text alone."""
    names = ("O", "B-A", "I-A", "B-B")
    given = [np.array([1, 2, 0, 3]), np.array([1, 0, 3])]
    found = [np.array([1, 2, 0, 3]), np.array([1, 2, 0])]
    scores = entities.score(found, given, names)
    assert list(scores) == ["f1", "precision", "recall", "accuracy"]
    assert scores == pytest.approx({"f1": 4 / 7, "precision": 2 / 3, "recall": 2 / 4, "accuracy": 5 / 7})
    nothing = entities.score([np.zeros(2, int)], [np.zeros(2, int)], names)
    assert nothing == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}


def test_tags_that_mark_no_entities_have_their_accuracy_only():
    assert entities.score([np.array([0, 1])], [np.array([1, 1])], ("NOUN", "VERB")) == {"accuracy": 0.5}
    with pytest.raises(InputError, match="the tag 'S-A' is not of IOB2; expected O, B-TYPE and I-TYPE"):
        entities.is_iob(("B-A", "O", "S-A"))
