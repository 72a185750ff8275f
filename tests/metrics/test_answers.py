"""Scores of answers, by literals of SQuAD's scorer."""

import numpy as np
import pytest

from dsee_jax.metrics import answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The Cat's  hat.", "cats hat"), ("an apple, a day", "apple day"), ("Theatre-A", "theatrea"), ("A", "")],
)
def test_normalised_text_has_no_articles_and_punctuation(text, expected):
    assert answers.normalised(text) == expected


def test_scores_are_the_best_over_the_right_answers():
    """Repeated words count as often as both texts have them; the mean is over questions."""
    scores = answers.score(["the big big cat", "dog"], [["cat", "Big cat!"], ["bird", "a dog"]])
    assert scores == pytest.approx({"f1": (4 / 5 + 1) / 2, "exact_match": 1 / 2})
    assert answers.score(["x"], [["y z"]]) == {"f1": 0.0, "exact_match": 0.0}


def test_scores_of_unanswerable_questions():
    """By SQuAD's scorer v2.0: no answer is right only where there is none."""
    scores = answers.score(["", "", "a cat", "big cat"], [[], ["cat"], [], ["cat"]])
    expected = {"f1": (1 + 0 + 0 + 2 / 3) / 4, "exact_match": 1 / 4, "f1_answerable": 1 / 3, "f1_unanswerable": 1 / 2}
    assert scores == pytest.approx(expected)


def test_best_span_ends_after_it_starts_and_is_not_too_long():
    starts, ends = np.full(40, -9.0), np.full(40, -9.0)
    starts[[3, 20]], ends[[2, 5, 39]] = (5.0, 1.0), (9.0, 1.0, 7.0)
    generator = np.random.default_rng(0)
    for firsts, lasts in ((starts, ends), generator.normal(size=(2, 40))):
        value, first, last = answers.best_span(firsts, lasts)
        pairs = [(s, e) for s in range(40) for e in range(s, min(s + answers.MOST_TOKENS, 40))]
        assert (first, last) == max(pairs, key=lambda pair: firsts[pair[0]] + lasts[pair[1]])
        assert value == firsts[first] + lasts[last]
