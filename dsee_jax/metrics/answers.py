"""Scores of answers to questions about a text, as by the scorers of SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250) and
v2.0 (Rajpurkar, Jia and Liang 2018, arXiv 1806.03822), where the right answer of some questions is none.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

MOST_TOKENS = 30
"""The longest answer, in tokens, that `best_span` considers."""

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, its words separated by single spaces."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _exact(answer: str, truth: str) -> float:
    return float(normalised(answer) == normalised(truth))


def _f1(answer: str, truth: str) -> float:
    """Return the F1 score of the words of an answer; words that repeat count as often as both texts have them."""
    own, other = normalised(answer).split(), normalised(truth).split()
    shared = sum((collections.Counter(own) & collections.Counter(other)).values())
    return 2 * shared / (len(own) + len(other)) if shared else 0.0


def score(answers: Sequence[str], truths: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return f1 and exact_match in [0, 1]: for each question the best over its right answers, then the mean.

    Args:
      answers: of each question; "" for none.
      truths: the right answers of each question; a question without any has both scores 1 for "" and 0 for another answer.
        If there are such questions, ``f1_answerable`` and ``f1_unanswerable`` are the means of the two kinds.
    """
    kinds = {"": [True] * len(truths)}
    if not all(truths):
        kinds |= {"_answerable": list(map(bool, truths)), "_unanswerable": [not some for some in truths]}

    def each(measure: Callable[[str, str], float]) -> np.ndarray:
        def best(answer: str, some: Sequence[str]) -> float:
            return max(measure(answer, truth) for truth in some) if some else float(not normalised(answer))

        return np.array([best(answer, some) for answer, some in zip(answers, truths, strict=True)])

    f1 = each(_f1)
    means = {f"f1{kind}": float(np.mean(f1[chosen])) for kind, chosen in kinds.items() if any(chosen)}
    return {"f1": means.pop("f1"), "exact_match": float(np.mean(each(_exact)))} | means


def best_span(starts: np.ndarray, ends: np.ndarray) -> tuple[float, int, int]:
    """Return (score, first, last) of the span with the highest sum of logits, of at most `MOST_TOKENS` tokens.

    Args:
      starts: (n,) the logits of each token to be the first.
      ends: (n,) the logits of each token to be the last.
    """
    best = (-np.inf, 0, 0)
    for more in range(min(MOST_TOKENS, len(starts))):
        sums = starts[: len(starts) - more] + ends[more:]
        first = int(sums.argmax())
        best = max(best, (float(sums[first]), first, first + more), key=lambda each: each[0])
    return best
