"""Scores of written texts against their references, several of which an input may have: BLEU, NIST and ROUGE-L.

All are blind to case, as the official scorer of the E2E challenge is (Dušek et al. 2020, arXiv 1901.07931). BLEU is
sacrebleu's; it and NIST split words as mteval-v13a does. METEOR is not here: it needs WordNet or Java.
"""

import collections
import importlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dsee_jax.errors import InputError

NAMES = ("bleu", "nist", "rouge_l")
"""What `score` returns, in this order."""

_BETA = -math.log(0.5) / math.log(1.5) ** 2
"""NIST: texts of two thirds of the references' length lose half (Doddington 2002)."""

_WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|[\d.,:]*\d(?:-\w+)*|\w+(?:[-/&]\w+)*|[^\s\w]")
_PUNCTUATION = frozenset("'`.?!,:-;\"\u201c\u201d\u2018\u2019")


def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return all scores of ``n`` texts, each with one or more references.

    Raises `InputError` where there is no text, a text has no reference, or sacrebleu is not installed.
    """
    return {"bleu": bleu(texts, references), "nist": nist(texts, references), "rouge_l": rouge_l(texts, references)}


def need() -> None:
    """Raise `InputError` where sacrebleu is not installed."""
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
            f"{len(texts)} texts and {len(references)} lists of references; each text needs one or more of its own"
        )


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU-4 in [0, 100] (Papineni et al. 2002), as sacrebleu's with ``lowercase`` and its tokenizer 13a.

    Texts may have different numbers of references; the closest in length counts for brevity. Raises as `score`.
    """
    _check(texts, references)
    measure = _sacrebleu("metrics.bleu").BLEU(lowercase=True, force=True)
    return float(measure.corpus_score(list(texts), list(itertools.zip_longest(*references))).score)


def nist(texts: Sequence[str], references: Sequence[Sequence[str]], *, order: int = 5) -> float:
    """Return the NIST score, 0 or more, without an upper bound (Doddington 2002), as mteval-v13a defines it.

    The sum over n = 1 ... ``order`` of what the n-grams tell that a text shares with its references, for each n-gram
    written; ``log2(count(w1 ... wn-1) / count(w1 ... wn))`` over all references is what one tells. It is multiplied by a
    penalty for a total length below the references' mean. With numbers of references that differ this is the challenge's
    definition in Python; its Perl counts missing references as empty ones. Raises as `score`.
    """
    _check(texts, references)
    tokenizer = _sacrebleu("tokenizers.tokenizer_13a").Tokenizer13a()

    def words(text: str) -> list[str]:
        return tokenizer(text).lower().split()

    written = [words(text) for text in texts]
    wanted = [[words(each) for each in some] for some in references]
    counts = collections.Counter(
        gram for some in wanted for each in some for n in range(1, order + 1) for gram in _grams(each, n)
    )
    counts[()] = sum(len(each) for some in wanted for each in some)
    told = 0.0
    for n in range(1, order + 1):
        shared: collections.Counter[tuple[str, ...]] = collections.Counter()
        for text, some in zip(written, wanted, strict=True):
            most: collections.Counter[tuple[str, ...]] = collections.Counter()
            for each in some:
                most |= collections.Counter(_grams(each, n))
            shared += collections.Counter(_grams(text, n)) & most
        total = sum(max(len(text) - n + 1, 0) for text in written)
        told += sum(hits * math.log2(counts[gram[:-1]] / counts[gram]) for gram, hits in shared.items()) / max(total, 1)
    length = sum(map(len, written)) / sum(sum(map(len, some)) / len(some) for some in wanted)
    if length <= 0:
        return 0.0
    return told * math.exp(-_BETA * math.log(min(length, 1.0)) ** 2)


def _grams(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]], *, beta: float = 1.2) -> float:
    """Return the mean ROUGE-L F score in [0, 1] (Lin 2004), as the E2E challenge's scorer has it from MS COCO's.

    Of the longest common subsequences with the references, the best precision and the best recall make
    ``(1 + beta^2) P R / (R + beta^2 P)``. Punctuation does not count; words are split nearly as by the Penn treebank's rules
    (the scorer runs Stanford's tokenizer, in Java). Raises as `score`.
    """
    _check(texts, references)
    found = []
    for text, some in zip(texts, references, strict=True):
        own = _words(text)
        pairs = [(_common(own, other), len(other)) for other in map(_words, some)]
        precision = max(shared for shared, _ in pairs) / max(len(own), 1)
        recall = max(shared / max(length, 1) for shared, length in pairs)
        found.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision else 0.0)
    return sum(found) / len(found)


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in _PUNCTUATION]


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, the rows of its table as bits (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for number, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << number
    row = whole = (1 << len(a)) - 1
    for word in b:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & whole
    return len(a) - row.bit_count()
