"""Scores of texts equal those of the reference implementations, on a few fixed texts.

The numbers ignore case and come from sacrebleu 2.6.0 (BLEU) and the scorer of the E2E challenge
(github.com/tuetschek/e2e-metrics, 1b9c4d8): mteval-v13a-sig.pl (NIST, 4 digits, for texts with equal numbers of references),
metrics/pymteval.py (NIST), and Rouge of pycocoevalcap with the PTBTokenizer of Stanford CoreNLP 3.4.1 (ROUGE-L).
"""

import pytest

from dsee_jax.errors import InputError
from dsee_jax.metrics import text

pytest.importorskip("sacrebleu", reason="needs sacrebleu (extra `text`)")

TEXTS = [
    "The Wrestlers is a cheap coffee shop near the river.",
    "Zizzi serves Italian food; it's rated 5 out of 5.",
    "In the city centre, Cotto offers high-priced, family-friendly meals (£20-25) and isn't rated well.",
    "The Punter Punter Punter is by the sea.",
    "a pub",
]
REFERENCES = [
    [
        "The Wrestlers is a coffee shop by the river. It is cheap.",
        "Near the river, the Wrestlers is a cheap coffee shop.",
    ],
    [
        "Zizzi, rated 5 out of 5, serves Italian food.",
        "It's an Italian place called Zizzi.",
        "Zizzi has 5 of 5 stars.",
    ],
    [
        "Cotto is a family-friendly place in the city centre; its meals cost £20-25 and its rating isn't good.",
        "Family friendly, high priced and low rated: Cotto, in the centre of the city.",
    ],
    ["The Punter is a restaurant by the sea.", "By the sea stands The Punter, a restaurant."],
    ["There is a pub called The Mill."],
]


@pytest.mark.parametrize(
    ("texts", "most", "bleu", "nist", "rouge_l"),
    [
        # mteval-v13a-sig.pl: NIST 5.2168, BLEU 0.4009
        (4, 2, 40.0945249282933, 5.216812471950268, 0.6550457153873305),
        (4, 3, 40.0945249282933, 5.237259714134787, 0.6550457153873305),
        # mteval-v13a-sig.pl: NIST 3.8328, BLEU 0.2726
        (5, 1, 27.2575737015545, 3.8327837762172865, None),
        # pymteval counts a negative number of n-grams in a text shorter than n, so its NIST is not comparable here
        (5, 3, 36.229965572659495, None, 0.6048312742966193),
    ],
)
def test_scores_equal_the_reference_implementations(texts, most, bleu, nist, rouge_l):
    scores = text.score(TEXTS[:texts], [some[:most] for some in REFERENCES[:texts]])
    assert tuple(scores) == text.NAMES
    assert scores["bleu"] == pytest.approx(bleu, rel=1e-9)
    assert nist is None or scores["nist"] == pytest.approx(nist, rel=1e-9)
    assert rouge_l is None or scores["rouge_l"] == pytest.approx(rouge_l, rel=1e-9)


def test_rouge_l_by_hand():
    """a c of a b c and a c d e: P 1, R 2/3 of the first reference, and F with beta 1.2; the same words are 1."""
    expected = 2.44 * (2 / 3) / (2 / 3 + 1.44)
    assert text.rouge_l(["a c"], [["a b c", "a c d e"]]) == pytest.approx(expected)
    assert text.rouge_l(["A, c!"], [["a c."]]) == 1
    assert text.rouge_l(["", "x"], [["a"], ["y"]]) == 0


def test_exact_match_ignores_case_and_outer_spaces_only():
    """Of four texts one equals its second reference; a longer, a split and an empty text do not."""
    some = [["no", " Positive"], ["positive"], ["a b"], ["no"]]
    assert text.exact_match(["positive ", "positive.", "a  b", ""], some) == 0.25


def test_identical_and_disjoint_texts_score_the_extremes():
    """A text equal to its reference; a text that shares no word with it; an empty text."""
    same = text.score(TEXTS, [[text] for text in TEXTS])
    assert same["bleu"] == pytest.approx(100)
    assert same["rouge_l"] == 1
    assert same["nist"] > text.nist(TEXTS, REFERENCES)
    for nothing in (["x y z"], [""]):
        assert text.score(nothing, [["a b c"]]) == dict.fromkeys(text.NAMES, 0)


@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_texts_without_references_are_refused(texts, references):
    with pytest.raises(InputError, match="each text needs one or more"):
        text.score(texts, references)
