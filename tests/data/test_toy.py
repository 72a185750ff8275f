"""The built-in task: labels are correct, dev combinations are new, and words alone do not predict the label."""

import itertools

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from dsee_jax.data import toy
from dsee_jax.data.toy import FORMS, LABELS, Phrase, Sentence

ALL, NO, SOME, SOME_NOT, NOT_ALL = range(5)
DOGS, POODLES, ANIMALS, CATS = (Phrase(noun, "") for noun in ("dogs", "poodles", "animals", "cats"))
RUN, SPRINT, RUN_AT_NIGHT = Phrase("run", ""), Phrase("sprint", ""), Phrase("run", "at night")


@pytest.mark.parametrize(
    ("premise", "hypothesis", "label"),
    [
        ((ALL, DOGS, RUN), (SOME, POODLES, RUN), "entailment"),  # there are poodles
        ((ALL, DOGS, RUN), (ALL, ANIMALS, RUN), "neutral"),
        ((SOME, POODLES, SPRINT), (SOME, ANIMALS, RUN), "entailment"),
        ((SOME, DOGS, RUN), (SOME, POODLES, RUN), "neutral"),
        ((NO, ANIMALS, RUN), (NO, DOGS, RUN_AT_NIGHT), "entailment"),
        ((NO, DOGS, SPRINT), (NO, DOGS, RUN), "neutral"),
        ((NO, ANIMALS, RUN), (SOME, POODLES, SPRINT), "contradiction"),
        ((ALL, DOGS, SPRINT), (NO, DOGS, RUN), "contradiction"),
        ((ALL, DOGS, SPRINT), (NOT_ALL, DOGS, RUN), "contradiction"),
        ((NOT_ALL, POODLES, RUN), (SOME_NOT, ANIMALS, SPRINT), "entailment"),
        ((SOME_NOT, DOGS, RUN), (ALL, DOGS, SPRINT), "contradiction"),
        ((SOME, DOGS, RUN), (NOT_ALL, DOGS, RUN), "neutral"),  # "some" may be all
        ((ALL, DOGS, RUN), (SOME, CATS, RUN), "neutral"),
    ],
)
def test_label_of_known_pairs(premise, hypothesis, label):
    assert LABELS[toy.relation(Sentence(*premise), Sentence(*hypothesis))] == label


def test_label_equals_a_search_over_small_models():
    """Brute force: evaluate the sentences in every model of three individuals that the words allow."""
    nouns = [DOGS, POODLES, Phrase("dogs", "wet"), CATS]
    individuals = range(3)
    subsets = [frozenset(s) for size in range(4) for s in itertools.combinations(individuals, size)]

    def true(sentence, noun, verb):
        form = FORMS[sentence.form]
        hits = [(who in verb) == form.positive for who in noun]
        return all(hits) if form.universal else any(hits)

    for (noun, other), verb in itertools.product(itertools.product(nouns, repeat=2), (RUN, SPRINT)):
        models = [
            (n, o, v, w)
            for n, o, v, w in itertools.product(subsets, repeat=4)
            if n
            and o
            and (not toy.is_included(noun, other) or n <= o)
            and (not toy.is_included(other, noun) or o <= n)
            and (not toy.is_included(verb, RUN) or v <= w)
            and (not toy.is_included(RUN, verb) or w <= v)
        ]
        for p, h in itertools.product(range(len(FORMS)), repeat=2):
            premise, hypothesis = Sentence(p, noun, verb), Sentence(h, other, RUN)
            seen = {true(hypothesis, o, w) for n, o, v, w in models if true(premise, n, v)}
            expected = {frozenset([True]): 0, frozenset([True, False]): 1, frozenset([False]): 2}[frozenset(seen)]
            assert toy.relation(premise, hypothesis) == expected, (premise.text, hypothesis.text)


def test_sentence_is_english():
    sentence = Sentence(SOME_NOT, Phrase("dogs", "wet"), Phrase("eat apples", "at night"))
    assert sentence.text == "some wet dogs do not eat apples at night"


def test_dev_hypotheses_have_held_out_combinations():
    splits = toy.generate(600, 150)

    def combinations(split, sentences=slice(None)):
        return {(s.form, s.noun.head, s.verb.head) for pair in splits[split] for s in pair[sentences]}

    assert len(set(splits["train"])) == 600
    assert len(set(splits["dev"])) == 150
    assert not combinations("train") & combinations("dev", slice(1, None))
    for column in range(3):  # only the combinations are new
        words = [{combination[column] for combination in combinations(split)} for split in ("train", "dev")]
        assert words[1] <= words[0]


def test_pairs_depend_on_the_seed_only():
    assert toy.generate(60, 30) == toy.generate(60, 30)
    assert toy.generate(60, 30) != toy.generate(60, 30, seed=1)


def test_words_alone_do_not_predict_the_label():
    """The classes are balanced, and linear models of the words are near chance (1/3)."""
    task = toy.load()
    train, dev = task.train, task.dev["dev"]
    assert (len(train.labels), len(dev.labels)) == (4000, 800)
    for examples in (train, dev):
        counts = np.bincount(examples.labels)
        assert len(counts) == 3
        assert np.ptp(counts) <= 1

    def score(view, pattern):
        model = make_pipeline(CountVectorizer(token_pattern=pattern), LogisticRegression(C=0.1, max_iter=1000))
        return model.fit(view(train), train.labels).score(view(dev), dev.labels)

    def hypothesis(examples):
        return examples.pair

    def both(examples):  # each word is marked with its sentence
        return [
            " ".join([f"p_{word}" for word in premise.split()] + [f"h_{word}" for word in hypothesis.split()])
            for premise, hypothesis in zip(examples.text, examples.pair, strict=True)
        ]

    assert score(hypothesis, r"\S+") < 0.42
    assert score(both, r"\S+") < 0.42
