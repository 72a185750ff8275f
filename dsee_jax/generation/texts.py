"""Texts that a decoder generates for prompts, batch by batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dsee_jax.deltas.adapter import Adapter
from dsee_jax.generation import decoding
from dsee_jax.models.architecture import Model
from dsee_jax.runtime import multihost
from dsee_jax.typing import Key, Params

MULTIPLE = 32
"""Prompts are padded to a multiple of this number of tokens, so that few lengths are compiled."""


class Writer(NamedTuple):
    """A decoder with its updates and its tokenizer."""

    model: Model  # of the task causal-lm
    params: Params
    adapter: Adapter | None  # None without updates
    tokenizer: Any
    ends: tuple[int, ...]  # end-of-text token ids
    pad: int  # padding token id
    defaults: Mapping[str, Any] = {}  # options of `dsee_jax.generation.Options` that the model's files set


def generate(
    writer: Writer, prompts: Sequence[list[int]], *, batch_size: int, key: Key | None = None, **options: Any
) -> list[str]:
    """Return the generated text of each prompt, without the prompt and the end of text.

    Args:
      writer: the decoder.
      prompts: token ids of each prompt.
      batch_size: prompts per batch; prompts of similar length share a batch.
      key: decides the samples; each batch folds its number into the key.
      **options: of `dsee_jax.generate`, without ``eos`` and ``pad``; they override ``writer.defaults``.

    Raises:
      InputError: as `dsee_jax.generate`.
    """
    model, ends, pad, options = writer.model, writer.ends, writer.pad, {**writer.defaults, **options}
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for batch, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        # The last batch repeats a prompt, so that all batches have one shape.
        filled = [prompts[row] for row in rows] + [prompts[rows[-1]]] * (min(batch_size, len(order)) - len(rows))
        longest, most = model.config.longest, max(map(len, filled))
        fits = longest is None or -(-most // MULTIPLE) * MULTIPLE <= longest
        ids, mask = decoding.pad_left(filled, pad=pad, multiple=MULTIPLE if fits else 1)
        batch_key = key if key is None else jax.random.fold_in(key, batch)
        tokens = decoding.generate(
            model, writer.params, ids, mask, adapter=writer.adapter, key=batch_key, eos=ends, pad=pad, **options
        )
        for row, generated in zip(rows, multihost.to_host(tokens), strict=False):
            texts[row] = _continuation(writer.tokenizer, prompts[row], _before_end(generated, ends))
    return texts


def _before_end(tokens: np.ndarray, ends: tuple[int, ...]) -> list[int]:
    """Return the tokens before the first end of text."""
    places = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: places[0] if len(places) else None].tolist()


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Return the text of ``new``, decoded together with the prompt: the text of a token depends on its predecessors."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + new, skip_special_tokens=True)[len(before) :]
