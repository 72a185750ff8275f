"""Scores of generated texts against one or more references each: BLEU, NIST, ROUGE-L and exact match.

All scores ignore case, as the official scorer of the E2E challenge does (Dušek et al. 2020, arXiv 1901.07931). BLEU is
sacrebleu's. BLEU and NIST split words as mteval-v13a does. METEOR is left out, because it needs WordNet or Java.
"""

import collections
import importlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dsee_jax.errors import InputError

NAMES = ("bleu", "nist", "rouge_l", "exact_match")
"""The keys of the result of `score`, in this order."""

_BETA = -math.log(0.5) / math.log(1.5) ** 2
"""NIST: the penalty of texts of two thirds of the length of the references is 1/2 (Doddington 2002)."""

_WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|[\d.,:]*\d(?:-\w+)*|\w+(?:[-/&]\w+)*|[^\s\w]")
_PUNCTUATION = frozenset("'`.?!,:-;\"\u201c\u201d\u2018\u2019")


def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return all scores of texts, each with one or more references.

    Raises:
      InputError: there are no texts, a text has no reference, or sacrebleu is not installed.
    """
    return {name: measure(texts, references) for name, measure in zip(NAMES, _MEASURES, strict=True)}


def need() -> None:
    """Raise `InputError` if sacrebleu is not installed."""
    _sacrebleu("metrics.bleu")


def _sacrebleu(module: str) -> Any:
    try:
        return importlib.import_module(f"sacrebleu.{module}")
    except ImportError as error:
        raise InputError(
            f"scores of texts need sacrebleu ({error}): pip install 'dsee-jax[text]', or set generate.new_tokens to 0"
        ) from None


def _check(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not texts or len(texts) != len(references) or not all(references):
        raise InputError(
            f"{len(texts)} texts and {len(references)} lists of references; each text needs one or more references"
        )


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU-4 in [0, 100] (Papineni et al. 2002) from sacrebleu, with ``lowercase`` and the tokenizer 13a.

    Texts may differ in their numbers of references. The brevity penalty takes the reference of the closest length. Raises as
    `score`.
    """
    _check(texts, references)
    measure = _sacrebleu("metrics.bleu").BLEU(lowercase=True, force=True)
    return float(measure.corpus_score(list(texts), list(itertools.zip_longest(*references))).score)


def nist(texts: Sequence[str], references: Sequence[Sequence[str]], *, order: int = 5) -> float:
    """Return the NIST score, 0 or more, without an upper bound (Doddington 2002), as mteval-v13a defines it.

    The information of an n-gram is ``log2(count(w1 ... wn-1) / count(w1 ... wn))``, with counts over all references. For each
    n = 1 ... ``order``, the information of the n-grams that a text shares with its references is divided by the number of
    n-grams in the texts. The sum over n is multiplied by a penalty for a total length below the mean length of the
    references. Where the numbers of references differ, this is the Python version of the challenge's scorer; the Perl version
    counts missing references as empty. Raises as `score`.
    """
    _check(texts, references)
    tokenizer = _sacrebleu("tokenizers.tokenizer_13a").Tokenizer13a()

    def words(text: str) -> list[str]:
        return tokenizer(text).lower().split()

    split_texts = [words(text) for text in texts]
    split_references = [[words(each) for each in some] for some in references]
    counts = collections.Counter(
        gram for some in split_references for each in some for n in range(1, order + 1) for gram in _grams(each, n)
    )
    counts[()] = sum(len(each) for some in split_references for each in some)
    information = 0.0
    for n in range(1, order + 1):
        shared: collections.Counter[tuple[str, ...]] = collections.Counter()
        for text, some in zip(split_texts, split_references, strict=True):
            most: collections.Counter[tuple[str, ...]] = collections.Counter()
            for each in some:
                most |= collections.Counter(_grams(each, n))
            shared += collections.Counter(_grams(text, n)) & most
        total = sum(max(len(text) - n + 1, 0) for text in split_texts)
        bits = sum(hits * math.log2(counts[gram[:-1]] / counts[gram]) for gram, hits in shared.items())
        information += bits / max(total, 1)
    length = sum(map(len, split_texts)) / sum(sum(map(len, some)) / len(some) for some in split_references)
    if length <= 0:
        return 0.0
    return information * math.exp(-_BETA * math.log(min(length, 1.0)) ** 2)


def _grams(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]], *, beta: float = 1.2) -> float:
    """Return the mean ROUGE-L F score in [0, 1] (Lin 2004), as in the scorers of the E2E challenge and MS COCO.

    A text scores ``(1 + beta^2) P R / (R + beta^2 P)``, with the best precision P and the best recall R of its longest common
    subsequences with the references. Punctuation does not count. Words are split nearly by the rules of the Penn treebank; the
    scorers run Stanford's tokenizer, in Java. Raises as `score`.
    """
    _check(texts, references)
    scores = []
    for text, some in zip(texts, references, strict=True):
        own = _words(text)
        pairs = [(_common(own, other), len(other)) for other in map(_words, some)]
        precision = max(shared for shared, _ in pairs) / max(len(own), 1)
        recall = max(shared / max(length, 1) for shared, length in pairs)
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision else 0.0)
    return sum(scores) / len(scores)


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the fraction of texts that equal one of their references, but for case and spaces around them, in [0, 1].

    For prompts whose answer is a class this is the accuracy. Raises as `score`.
    """
    _check(texts, references)
    equal = [_plain(text) in map(_plain, some) for text, some in zip(texts, references, strict=True)]
    return sum(equal) / len(equal)


def _plain(text: str) -> str:
    return text.strip().lower()


_MEASURES = (bleu, nist, rouge_l, exact_match)


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in _PUNCTUATION]


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence; the rows of its table are bits (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for number, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << number
    row = every = (1 << len(a)) - 1
    for word in b:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(a) - row.bit_count()
