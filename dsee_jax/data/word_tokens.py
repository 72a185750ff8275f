"""Token ids of tagged words: the first token of each word has its tag, the others have a loss weight of 0."""

import logging
from typing import Any

import numpy as np

from dsee_jax.data.examples import TaggedWords
from dsee_jax.data.tokens import CHUNK, Tokens, check_ids, warn_unknown
from dsee_jax.errors import InputError
from dsee_jax.runtime import multihost

log = logging.getLogger(__name__)


def tokenize(tokenizer: Any, examples: TaggedWords, max_length: int, *, vocab_size: int) -> Tokens:
    """Return the `Tokens` of texts whose words are joined by spaces; ``labels`` and ``weights`` are those of tokens.

    A word without a token of its own is neither learnt nor scored, with a warning on the logger: its text is longer than
    ``max_length``, or the tokenizer drops its characters. In a distributed run each process encodes one part of the texts.

    Args:
      tokenizer: from `load_tokenizer`; a fast one.
      examples: ``n`` texts.
      max_length: the most tokens of a text, special tokens included.
      vocab_size: rows of the model's embedding.

    Raises:
      InputError: ``max_length`` leaves no room for text, an id is not less than ``vocab_size``, or a text has no word with a
        token.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise InputError(f"data.max_length: {max_length} leaves no room for text; special tokens alone take {special}")
    parts = multihost.map_shards(len(examples.words), lambda part: _encode_part(tokenizer, examples, part, max_length))
    ids, labels, weights, lengths = map(np.concatenate, zip(*parts, strict=True))
    pad = tokenizer.pad_token_id or 0
    check_ids(max(int(ids.max()), pad), vocab_size)
    warn_unknown(tokenizer, ids, len(ids) - special * len(lengths))
    tagged, words = int(weights.sum()), sum(map(len, examples.words))
    if tagged < words:
        log.warning(
            "%d of %d words have no token, as data.max_length = %d ends their texts or the tokenizer drops their characters: "
            "they are neither learnt nor scored",
            *(words - tagged, words, max_length),
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(ids, np.zeros_like(ids), offsets, labels, pad, weights)


def _encode_part(tokenizer: Any, examples: TaggedWords, part: slice, max_length: int) -> tuple[np.ndarray, ...]:
    """Return ids, labels and weights, (tokens,) each, and lengths, of the texts ``part``."""
    ids, labels, weights, lengths = [], [], [], []
    for start in range(part.start, part.stop, CHUNK):
        rows = range(start, min(start + CHUNK, part.stop))
        encoded = tokenizer(
            [" ".join(examples.words[row]) for row in rows],
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
        )
        for row, tokens, spans in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            places, words = _first_tokens(examples.words[row], np.asarray(spans))
            if not len(places):
                raise InputError(f"{examples.where[row]}: no word of the text has a token: check its words")
            own, weight = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
            own[places], weight[places] = np.asarray(examples.tags[row])[words], 1
            ids.append(np.asarray(tokens, np.int32))
            labels.append(own)
            weights.append(weight)
            lengths.append(len(tokens))
    return np.concatenate(ids), np.concatenate(labels), np.concatenate(weights), np.array(lengths, np.int64)


def _first_tokens(words: list[str], spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the first tokens of words, and the indices of the words.

    ``spans`` (tokens, 2) are the characters of each token in the joined text. Those of special tokens are empty; those of
    others may begin with the space before the word, which their last character tells.
    """
    ends = np.cumsum([len(word) + 1 for word in words])  # of each word with the space after it
    real = np.flatnonzero(spans[:, 1] > spans[:, 0])
    numbers, first = np.unique(np.searchsorted(ends, spans[real, 1] - 1, side="right"), return_index=True)
    return real[first], numbers
