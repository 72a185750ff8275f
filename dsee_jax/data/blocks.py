"""Plain texts end to end, in blocks of equal length: a language model predicts every token but the first, once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsee_jax.data.examples import Texts
from dsee_jax.data.tokens import Tokens, check_ids
from dsee_jax.errors import InputError
from dsee_jax.runtime import multihost


def tokenize(
    tokenizer: Any, examples: Texts, max_length: int, *, ends: Sequence[int], pad_id: int, vocab_size: int
) -> Tokens:
    """Return texts as the `Tokens` of blocks.

    Each text has the special tokens of the tokenizer and ends with an end of text. A block begins with the last token of the
    block before it, whose tokens it does not see: each token is predicted from the tokens of one block.

    Args:
      tokenizer: from `load_tokenizer`.
      examples: the texts, in their order.
      max_length: the tokens of a block, 2 or more; the last may be shorter.
      ends: end-of-text ids; the first is appended to texts that do not end with one of them.
      pad_id: the padding id.
      vocab_size: rows of the model's embedding.

    Raises:
      InputError: an id is not less than ``vocab_size``, or the texts have less than two tokens.
    """
    parts = multihost.map_shards(len(examples.text), lambda part: _encode_part(tokenizer, examples.text[part], ends))
    ids = np.concatenate(parts)
    if len(ids) < 2:
        raise InputError(
            f"{examples.where[0]}: {len(ids)} tokens in all; a language model needs two or more: give more text"
        )
    check_ids(int(ids.max()), vocab_size)
    starts = np.arange(0, len(ids) - 1, max_length - 1)
    lengths = np.minimum(starts + max_length, len(ids)) - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, lengths)
    weights = np.ones(len(places), np.float32)
    weights[offsets[1:] - 1] = 0
    inputs = ids[places]
    return Tokens(inputs, np.zeros_like(inputs), offsets, np.roll(inputs, -1), pad_id, weights)


def _encode_part(tokenizer: Any, texts: Sequence[str], ends: Sequence[int]) -> np.ndarray:
    """Return the ids of texts end to end, (tokens,) int32."""
    rows = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []  # no warning about the length of texts
    parts = [row if row and row[-1] in ends else [*row, *ends[:1]] for row in rows]
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(part, np.int32) for part in parts)])
