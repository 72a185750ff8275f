"""Texts that a decoder writes for prompts, batch by batch, and what they are scored on."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dsee_jax.generation import decoding
from dsee_jax.runtime import multihost
from dsee_jax.typing import Key, Params

MULTIPLE = 32
"""Prompts are padded to a multiple of so many tokens, so that few lengths are compiled."""


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
        ids, mask = decoding.pad_left(filled, pad=pad, multiple=MULTIPLE if fits else 1)
        folded = key if key is None else jax.random.fold_in(key, batch)
        new = decoding.generate(model, params, ids, mask, key=folded, eos=ends, pad=pad, **updates, **options)
        for row, written in zip(rows, multihost.to_host(new), strict=False):
            found[row] = _text(tokenizer, prompts[row], _whole(written, ends))
    return found


def _whole(tokens: np.ndarray, ends: tuple[int, ...]) -> list[int]:
    found = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: found[0] if len(found) else None].tolist()


def _text(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Decode together: how a first token is written depends on what stands before it."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + new, skip_special_tokens=True)[len(before) :]
