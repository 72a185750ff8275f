"""Dev-set prompts with their reference texts, against which generated texts are scored."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class References(NamedTuple):
    """Different prompts, each with the texts that people wrote for it."""

    tokenizer: Any
    ends: tuple[int, ...]  # end-of-text token ids
    pad: int  # padding token id
    prompts: list[list[int]]  # token ids of each prompt, no two equal
    texts: list[list[str]]  # one or more per prompt


def group_by_prompt(
    tokenizer: Any,
    ends: tuple[int, ...],
    pad: int,
    pairs: Sequence[tuple[list[int], list[int]]],
    completions: Sequence[str],
    *,
    most: int = 0,
) -> References:
    """Return the different prompts of ``pairs`` (ids of a prompt, ids of its response), each with all its completions.

    ``most`` limits the result to the first prompts; 0 = all prompts.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for (prompt, _), completion in zip(pairs, completions, strict=True):
        groups.setdefault(tuple(prompt), []).append(completion.strip())
    prompts, texts = [list(prompt) for prompt in groups], list(groups.values())
    return References(tokenizer, ends, pad, prompts[: most or None], texts[: most or None])
