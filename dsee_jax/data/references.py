"""Prompts with the reference texts that generated texts are scored against."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Exercise(NamedTuple):
    """Prompts, each with the texts that people wrote for it."""

    tokenizer: Any
    ends: tuple[int, ...]  # tokens that end a text
    pad: int
    prompts: list[list[int]]  # token ids, all different
    references: list[list[str]]  # one or more of each prompt


def exercise(
    tokenizer: Any,
    ends: tuple[int, ...],
    pad: int,
    pairs: Sequence[tuple[list[int], list[int]]],
    completions: Sequence[str],
    *,
    most: int = 0,
) -> Exercise:
    """Return the different prompts of ``pairs`` (ids of a prompt, ids of what follows), each with all its completions.

    ``most``: only the first so many prompts; 0: all.
    """
    found: dict[tuple[int, ...], list[str]] = {}
    for (prompt, _), completion in zip(pairs, completions, strict=True):
        found.setdefault(tuple(prompt), []).append(completion.strip())
    prompts, references = [list(prompt) for prompt in found], list(found.values())
    return Exercise(tokenizer, ends, pad, prompts[: most or None], references[: most or None])
