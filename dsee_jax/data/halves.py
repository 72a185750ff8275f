"""A dev set in two halves: the validation half chooses among the evaluations of a run, the test half scores the chosen model.

The best of many evaluations on one set is also the luckiest: its score on this set is too high. A half that took no part in
the choice has no such bias (Cawley and Talbot 2010, JMLR 11, section 5).
"""

import json
import re
from collections.abc import Hashable, Sequence

import numpy as np

from dsee_jax.data.examples import Examples, Prompts, Questions, Split, Texts, take
from dsee_jax.errors import InputError

LEAST = 4
"""The fewest units of a dev set, two for each half."""


def divide(name: str, examples: Split) -> tuple[Split, Split]:
    """Return the validation half and the test half of a dev set, each in the order of the set.

    The division depends on the set alone, not on the seed of a run, so that runs of different seeds compare. Units stay
    whole: all references of a prompt, all questions about a text. The halves differ by at most one unit, and those of a
    classification by at most one example of each class. Of one to three plain texts, each is cut near its middle.

    Args:
      name: of the dev set, for the message.
      examples: the dev set.

    Raises:
      InputError: the set has fewer than `LEAST` units, or a text has no two halves.
    """
    if isinstance(examples, Texts) and len(examples.text) < LEAST:
        return _cut(name, examples)
    index: dict[Hashable, int] = {}
    units = np.array([index.setdefault(key, len(index)) for key in _keys(examples)])
    if len(index) < LEAST:
        kind = "different prompts" if isinstance(examples, Prompts) else "texts"
        raise InputError(
            f"data.split_dev: the dev set {name!r} has {len(index)} {kind}; expected {LEAST} or more, two for each half: "
            "set it to false, or give a larger dev set"
        )
    order = np.random.default_rng(0).permutation(len(index))
    if isinstance(examples, Examples) and examples.labels.ndim == 1 and examples.labels.dtype.kind == "i":
        order = order[np.argsort(examples.labels[order], kind="stable")]
    chosen = np.isin(units, order[::2])
    return take(examples, np.flatnonzero(chosen)), take(examples, np.flatnonzero(~chosen))


def _keys(examples: Split) -> Sequence[Hashable]:
    """Return a key for each example; examples of one key are one unit."""
    match examples:
        case Prompts():
            return [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in examples.prompt]
        case Questions():
            return examples.context
        case _:
            return range(len(examples[0]))


def _cut(name: str, examples: Texts) -> tuple[Texts, Texts]:
    """Return the first and the second half of each text, cut at the first white space after its middle."""
    halves: tuple[list[str], list[str]] = ([], [])
    for text, where in zip(examples.text, examples.where, strict=True):
        space = re.compile(r"\s").search(text, len(text) // 2)
        at = space.start() if space else len(text) // 2
        for half, part in zip(halves, (text[:at], text[at:]), strict=True):
            if not part.strip():
                raise InputError(
                    f"{where}: data.split_dev cuts the text of the dev set {name!r} in two, and one half is empty: set it to "
                    "false, or give more text"
                )
            half.append(part)
    return Texts(halves[0], examples.where), Texts(halves[1], examples.where)
