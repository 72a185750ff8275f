"""A built-in task that needs language and no network: natural language inference over a small grammar.

A premise and a hypothesis such as *"all hungry dogs run"* and *"some poodles do not move"*: does the premise entail the
hypothesis, contradict it, or neither? A sentence is a quantifier, a noun phrase, an optional negation and a verb phrase.
Phrases are ordered by inclusion: poodles are dogs, hungry dogs are dogs, whoever runs in the park runs. The label is computed
by a search for models of the two sentences (`relation`).
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from dsee_jax.data.examples import Examples, Task

LABELS = ("entailment", "neutral", "contradiction")

_NOUNS = {  # word: its hypernym
    "animals": "",
    "dogs": "animals",
    "poodles": "dogs",
    "cats": "animals",
    "kittens": "cats",
    "birds": "animals",
    "parrots": "birds",
    "people": "",
    "doctors": "people",
    "surgeons": "doctors",
    "musicians": "people",
    "violinists": "musicians",
    "athletes": "people",
    "swimmers": "athletes",
}
_VERBS = {
    "move": "",
    "run": "move",
    "sprint": "run",
    "rest": "",
    "sleep": "rest",
    "eat": "",
    "eat fruit": "eat",
    "eat apples": "eat fruit",
    "play": "",
    "play games": "play",
}
_ADJECTIVES = ("", "hungry", "brown", "young", "wet")
_PLACES = ("", "in the park", "at night", "near the river", "on sundays")


class Form(NamedTuple):
    """A sentence form: ``universal`` = all of the nouns (else some), ``positive`` = they do (else they do not)."""

    template: str
    universal: bool
    positive: bool


FORMS = (
    Form("all {} {}", True, True),
    Form("no {} {}", True, False),
    Form("some {} {}", False, True),
    Form("some {} do not {}", False, False),
    Form("not all {} {}", False, False),
)


class Phrase(NamedTuple):
    """A head word and a modifier, which may be empty."""

    head: str
    modifier: str


class Sentence(NamedTuple):
    """One sentence of the grammar; ``form`` is an index of `FORMS`."""

    form: int
    noun: Phrase
    verb: Phrase

    @property
    def text(self) -> str:
        """The sentence in English, lower case, without a full stop."""
        noun = f"{self.noun.modifier} {self.noun.head}".strip()
        return FORMS[self.form].template.format(noun, f"{self.verb.head} {self.verb.modifier}".strip())


@functools.cache
def is_included(narrow: Phrase, wide: Phrase) -> bool:
    """Whether ``wide`` describes everything that ``narrow`` describes, by the meaning of the words."""
    if wide.modifier not in ("", narrow.modifier):
        return False
    head = narrow.head
    while head and head != wide.head:
        head = _NOUNS.get(head, "") or _VERBS.get(head, "")
    return bool(head)


def _order(first: Phrase, second: Phrase) -> tuple[bool, bool]:
    return is_included(first, second), is_included(second, first)


@functools.cache
def _relation(premise: Form, hypothesis: Form, nouns: tuple[bool, bool], verbs: tuple[bool, bool]) -> int:
    """Return `relation` by form and by the inclusions of nouns and verbs: (first in second, second in first) each."""
    kinds = [  # a kind of individual: whether noun 1, noun 2, verb 1, verb 2 describe it
        kind
        for kind in itertools.product((False, True), repeat=4)
        if not (nouns[0] and kind[0] > kind[1])
        and not (nouns[1] and kind[1] > kind[0])
        and not (verbs[0] and kind[2] > kind[3])
        and not (verbs[1] and kind[3] > kind[2])
    ]

    def possible(first: Form, second: Form) -> bool:
        empty, inhabited = set(), []
        for number, form in enumerate((first, second)):
            inhabited.append({kind for kind in kinds if kind[number]})
            matching = {kind for kind in inhabited[-1] if kind[2 + number] == form.positive}
            if form.universal:
                empty |= inhabited[-1] - matching
            else:
                inhabited.append(matching)
        return all(some - empty for some in inhabited)

    if not possible(premise, hypothesis._replace(universal=not hypothesis.universal, positive=not hypothesis.positive)):
        return 0
    return 1 if possible(premise, hypothesis) else 2


def relation(premise: Sentence, hypothesis: Sentence) -> int:
    """Return the exact relation of two sentences, as an index of `LABELS`.

    Sentences are statements about sets. A model is a set of existing kinds of individuals. A kind is a choice of the four
    phrases that describe it, subject to the inclusions of the words; each noun describes at least one individual. "All" and
    "no" exclude kinds; "some" and "not all" require one of several kinds. A model exists if no requirement is fully excluded.
    The premise entails the hypothesis if no model satisfies it together with the negated hypothesis. The premise contradicts
    the hypothesis if no model satisfies both.
    """
    return _relation(
        FORMS[premise.form],
        FORMS[hypothesis.form],
        _order(premise.noun, hypothesis.noun),
        _order(premise.verb, hypothesis.verb),
    )


_EQUAL, _NARROWER, _WIDER = (True, True), (True, False), (False, True)
# Inclusions of the noun phrases and of the verb phrases of a pair; at most one of the two is not equal.
_ORDERS = ((_EQUAL, _EQUAL), (_NARROWER, _EQUAL), (_WIDER, _EQUAL), (_EQUAL, _NARROWER), (_EQUAL, _WIDER))
_SHARES = ((3, 3, 2, 1, 1), (2, 2, 2, 1, 1), (2, 1, 1, 1, 1))  # weights of premise forms, hypothesis forms, orders


@functools.cache
def _cells() -> tuple[np.ndarray, np.ndarray]:
    """Return int (cells, 3) of premise form, hypothesis form and order, and float (cells,), the probability of each cell.

    None of the three predicts the label alone: iterative proportional fitting gives every class the same probability, and
    within every class the forms and orders the probabilities `_SHARES`.
    """
    cells = np.array(list(itertools.product(*(range(len(shares)) for shares in _SHARES))))
    labels = np.array([_relation(FORMS[p], FORMS[h], *_ORDERS[order]) for p, h, order in cells])
    weights = np.ones(len(cells))
    for _ in range(200):
        for column, shares in enumerate(_SHARES):
            group = labels * len(shares) + cells[:, column]
            weights *= np.array(shares)[cells[:, column]] / np.bincount(group, weights)[group]
    return cells, weights / weights.sum()


@functools.cache
def _pairs(heads: tuple[str, ...], modifiers: tuple[str, ...]) -> dict[tuple[bool, bool], list[tuple[Phrase, Phrase]]]:
    """Return all pairs of phrases, grouped by their inclusions."""
    phrases = [Phrase(head, modifier) for head in heads for modifier in modifiers]
    pairs: dict[tuple[bool, bool], list[tuple[Phrase, Phrase]]] = {}
    for first, second in itertools.product(phrases, repeat=2):
        pairs.setdefault(_order(first, second), []).append((first, second))
    return pairs


def generate(train: int = 4000, dev: int = 800, *, seed: int = 0) -> dict[str, list[tuple[Sentence, Sentence]]]:
    """Return ``train`` and ``dev`` different pairs of premise and hypothesis, drawn with ``seed``.

    A quarter of the combinations of form, noun and verb is held out: no training sentence has such a combination, every dev
    hypothesis has one. Class sizes of a split differ by at most one.
    """
    rng = np.random.default_rng(seed)
    combinations = list(itertools.product(range(len(FORMS)), _NOUNS, _VERBS))
    held_out = {combinations[number] for number in rng.permutation(len(combinations))[: len(combinations) // 4]}
    cells, shares = _cells()
    nouns, verbs = _pairs(tuple(_NOUNS), _ADJECTIVES), _pairs(tuple(_VERBS), _PLACES)
    splits: dict[str, dict[tuple[Sentence, Sentence], None]] = {"train": {}, "dev": {}}
    room = {
        (split, label): (size + label) // len(LABELS)
        for split, size in (("train", train), ("dev", dev))
        for label in range(len(LABELS))
    }
    while any(room.values()):
        premise, hypothesis, order = map(int, cells[rng.choice(len(cells), p=shares)])
        noun, verb = (
            pairs[part][rng.integers(len(pairs[part]))]
            for pairs, part in zip((nouns, verbs), _ORDERS[order], strict=True)
        )
        pair = Sentence(premise, noun[0], verb[0]), Sentence(hypothesis, noun[1], verb[1])
        reserved = [(sentence.form, sentence.noun.head, sentence.verb.head) in held_out for sentence in pair]
        split, label = "dev" if reserved[1] else "train", relation(*pair)
        if room[split, label] and not (reserved[0] and split == "train") and pair not in splits[split]:
            splits[split][pair] = None
            room[split, label] -= 1
    return {split: list(pairs) for split, pairs in splits.items()}


def load() -> Task:
    """Return the task: 4000 training and 800 dev pairs in three balanced classes; every call returns the same pairs."""
    splits = {
        name: Examples(
            [premise.text for premise, _ in pairs],
            [hypothesis.text for _, hypothesis in pairs],
            np.array([relation(premise, hypothesis) for premise, hypothesis in pairs], np.int32),
        )
        for name, pairs in generate().items()
    }
    return Task("toy", LABELS, splits["train"], {"dev": splits["dev"]})
