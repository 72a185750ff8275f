"""Texts that a decoder writes for prompts, batch by batch, and what they are scored on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dsee_jax import generation, processes
from dsee_jax.aliases import Key, Params

MULTIPLE = 32
"""Prompts are padded to a multiple of so many tokens, so that few lengths are compiled."""


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


def texts(
    model: Any,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    ends: tuple[int, ...],
    pad: int,
    batch_size: int,
    updates: Mapping[str, Any],
    key: Key | None = None,
    **options: Any,
) -> list[str]:
    """Return what follows each prompt, the end of text left out.

    Args:
      model: causal-lm.
      params: its params.
      tokenizer: that of the model.
      prompts: token ids of each.
      ends: tokens that end a text.
      pad: the id to pad with.
      batch_size: prompts at once; those of similar length go together.
      updates: deltas, supports, scale, scale_sparse of `dsee_jax.generate`, where there are any.
      key: decides what is sampled; batches fold their number into it.
      **options: of `dsee_jax.generation.Options`.

    Raises:
      InputError: as `dsee_jax.generate` does.
    """
    found = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for batch, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        # The last batch repeats a prompt, to be of the shape of the others.
        filled = [prompts[row] for row in rows] + [prompts[rows[-1]]] * (min(batch_size, len(order)) - len(rows))
        longest, most = model.config.longest, max(map(len, filled))
        fits = longest is None or -(-most // MULTIPLE) * MULTIPLE <= longest
        ids, mask = generation.pad_left(filled, pad=pad, multiple=MULTIPLE if fits else 1)
        folded = key if key is None else jax.random.fold_in(key, batch)
        new = generation.generate(model, params, ids, mask, key=folded, eos=ends, pad=pad, **updates, **options)
        for row, written in zip(rows, processes.whole(new), strict=False):
            found[row] = _text(tokenizer, prompts[row], _whole(written, ends))
    return found


def _whole(tokens: np.ndarray, ends: tuple[int, ...]) -> list[int]:
    found = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: found[0] if len(found) else None].tolist()


def _text(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Decode together: how a first token is written depends on what stands before it."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + new, skip_special_tokens=True)[len(before) :]
