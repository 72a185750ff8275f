"""An embedded task that needs language and no network: natural language inference over a small grammar.

A premise and a hypothesis such as *"all hungry dogs run"* and *"some poodles do not move"*: does the first entail the
second, contradict it, or neither? Sentences are a quantifier, a noun phrase, perhaps a negation and a verb phrase;
phrases are ordered by inclusion (poodles are dogs, hungry dogs are dogs, who runs in the park runs). The label is not
written but decided, by looking for a model of the two sentences (see `relation`).
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from dsee_jax.data.examples import Examples, Task

LABELS = ("entailment", "neutral", "contradiction")

_NOUNS = {  # word: the next wider word
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
    """A sentence form: ``universal`` says all of the nouns (else some), ``positive`` that they do (else do not)."""

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
    """A head word and what narrows it, which may be empty."""

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
def below(narrow: Phrase, wide: Phrase) -> bool:
    """Whether everything that ``narrow`` describes, ``wide`` describes too, by the words alone."""
    if wide.modifier not in ("", narrow.modifier):
        return False
    head = narrow.head
    while head and head != wide.head:
        head = _NOUNS.get(head, "") or _VERBS.get(head, "")
    return bool(head)


def _order(first: Phrase, second: Phrase) -> tuple[bool, bool]:
    return below(first, second), below(second, first)


@functools.cache
def _relation(premise: Form, hypothesis: Form, nouns: tuple[bool, bool], verbs: tuple[bool, bool]) -> int:
    """`relation` for sentences whose noun and verb phrases include each other as said: (first in second, second in first)."""
    kinds = [  # a kind of individual: is it described by noun 1, noun 2, verb 1, verb 2?
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
    """Return the index in `LABELS` of how the sentences are related, decided exactly.

    Sentences speak of sets. A model says which kinds of individual exist, a kind being a choice of the four phrases
    that describe it, within the inclusions of the words; each noun describes somebody. "All" and "no" forbid kinds,
    "some" and "not all" ask for one; a model exists if what is asked for is not wholly forbidden. The premise entails the
    hypothesis if no model has it with the hypothesis' negation, contradicts it if no model has both.
    """
    return _relation(
        FORMS[premise.form],
        FORMS[hypothesis.form],
        _order(premise.noun, hypothesis.noun),
        _order(premise.verb, hypothesis.verb),
    )


_EQUAL, _NARROWER, _WIDER = (True, True), (True, False), (False, True)
# How the noun phrases and the verb phrases of a pair include each other: one of the two differs at most.
_ORDERS = ((_EQUAL, _EQUAL), (_NARROWER, _EQUAL), (_WIDER, _EQUAL), (_EQUAL, _NARROWER), (_EQUAL, _WIDER))
_SHARES = ((3, 3, 2, 1, 1), (2, 2, 2, 1, 1), (2, 1, 1, 1, 1))  # of premise forms, hypothesis forms, orders


@functools.cache
def _cells() -> tuple[np.ndarray, np.ndarray]:
    """Return int (cells, 3) of premise form, hypothesis form and order, and float (cells,): how often to draw each.

    No single one of the three may tell the label: iterative proportional fitting gives every class the same share, and
    within every class the forms and orders the same shares, `_SHARES`.
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
    """Return all pairs of phrases by their order."""
    phrases = [Phrase(head, modifier) for head in heads for modifier in modifiers]
    pairs: dict[tuple[bool, bool], list[tuple[Phrase, Phrase]]] = {}
    for first, second in itertools.product(phrases, repeat=2):
        pairs.setdefault(_order(first, second), []).append((first, second))
    return pairs


def generate(train: int = 4000, dev: int = 800, *, seed: int = 0) -> dict[str, list[tuple[Sentence, Sentence]]]:
    """Draw ``train`` and ``dev`` different pairs of premise and hypothesis, the same for the same seed.

    A quarter of the combinations of form, noun and verb is held out: no sentence of a training pair is such a
    combination, and the hypothesis of every dev pair is. The classes of a split differ in size by one at most.
    """
    rng = np.random.default_rng(seed)
    combinations = list(itertools.product(range(len(FORMS)), _NOUNS, _VERBS))
    held_out = {combinations[number] for number in rng.permutation(len(combinations))[: len(combinations) // 4]}
    cells, shares = _cells()
    nouns, verbs = _pairs(tuple(_NOUNS), _ADJECTIVES), _pairs(tuple(_VERBS), _PLACES)
    found: dict[str, dict[tuple[Sentence, Sentence], None]] = {"train": {}, "dev": {}}
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
        held = [(sentence.form, sentence.noun.head, sentence.verb.head) in held_out for sentence in pair]
        split, label = "dev" if held[1] else "train", relation(*pair)
        if room[split, label] and not (held[0] and split == "train") and pair not in found[split]:
            found[split][pair] = None
            room[split, label] -= 1
    return {split: list(pairs) for split, pairs in found.items()}


def load() -> Task:
    """Return the task: 4000 training and 800 dev pairs in three classes of equal frequency, always the same ones."""
    splits = {
        name: Examples(
            [premise.text for premise, _ in pairs],
            [hypothesis.text for _, hypothesis in pairs],
            np.array([relation(premise, hypothesis) for premise, hypothesis in pairs], np.int32),
        )
        for name, pairs in generate().items()
    }
    return Task("toy", LABELS, splits["train"], {"dev": splits["dev"]})
