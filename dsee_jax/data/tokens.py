"""Token ids of texts from a Hugging Face fast tokenizer, stored end to end without padding."""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt.folders import GENERATION, MODEL_CONFIG, read_json
from dsee_jax.data.examples import Examples
from dsee_jax.errors import InputError, shorten
from dsee_jax.runtime import multihost

log = logging.getLogger(__name__)

CHUNK = 8192  # examples per tokenizer call; bounds the memory of Python lists


class Windows(NamedTuple):
    """The places of tokens in the texts of questions."""

    questions: np.ndarray
    """(n,) int64: the index of the question of each row; a question has a row for each window of its text."""
    spans: np.ndarray
    """(tokens, 2) int32: the first character of each token in the text, and the one after its last; -1: not of the text."""


class TeacherOutputs(NamedTuple):
    """The outputs of a teacher for the examples of batches, or for those of their tokens that count in the loss."""

    rows: np.ndarray
    """(n,) or (tokens,) int64: the row of each example or token in ``arrays``; 0 for one in no batch, and for a token that
    does not count."""
    arrays: dict[str, np.ndarray]
    """(rows, ...), by their names in a batch."""
    by_token: bool
    """Whether ``rows`` is of tokens."""


class Tokens(NamedTuple):
    """Tokenised examples, concatenated: example ``i`` is ``input_ids[offsets[i]:offsets[i + 1]]``."""

    input_ids: np.ndarray
    """(tokens,) int32."""
    token_type_ids: np.ndarray
    """(tokens,) int32: 1 in the second sentence where the tokenizer has token types, else 0."""
    offsets: np.ndarray
    """(n + 1,) int64."""
    labels: np.ndarray
    """As of `Examples`; for questions (n, 2) int32: the first and last token of the answer. For causal-lm (tokens,) int32: the
    next token of each; for tagged words: the tag of each word's first token."""
    pad_id: int
    """The padding id."""
    weights: np.ndarray | None = None
    """For causal-lm (tokens,) float32: 1 where the next token belongs to a response, else 0; for tagged words: 1 at first
    tokens."""
    segments: np.ndarray | None = None
    """For packed texts (tokens,) int32: the number of each token's text in its row, from 1; None: one text per row."""
    windows: Windows | None = None
    """For questions about texts."""
    teacher: TeacherOutputs | None = None
    """For distillation."""

    @property
    def size(self) -> int:
        """n, the number of examples; of rows for packed texts."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: the number of tokens of each example."""
        return np.diff(self.offsets)


def tokenize(tokenizer: Any, examples: Examples, max_length: int, *, vocab_size: int) -> Tokens:
    """Return the `Tokens` of texts, or pairs of texts, in their order, with the tokenizer's special tokens.

    In a distributed run each process encodes one part of the examples.

    Args:
      tokenizer: from `load_tokenizer`.
      examples: ``n`` examples.
      max_length: the most tokens of one example, special tokens included; the longer sentence of a pair is truncated first.
      vocab_size: rows of the model's embedding.

    Raises:
      InputError: ``max_length`` leaves no room for text, an id is not less than ``vocab_size``, or no text gives a token.
    """
    special = tokenizer.num_special_tokens_to_add(pair=examples.pair is not None)
    if max_length <= special:
        raise InputError(f"data.max_length: {max_length} leaves no room for text; special tokens alone take {special}")
    encoded = multihost.map_shards(len(examples.text), lambda part: _encode_part(tokenizer, examples, part, max_length))
    input_ids, token_type_ids, lengths = map(np.concatenate, zip(*encoded, strict=True))
    pad = tokenizer.pad_token_id or 0
    check_ids(max(int(input_ids.max()), pad), vocab_size)
    if int(lengths.max()) <= special:
        raise InputError(
            f"none of the {len(lengths)} examples has text that the tokenizer knows: check the columns of the data"
        )
    warn_unknown(tokenizer, input_ids, len(input_ids) - special * len(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(input_ids, token_type_ids, offsets, examples.labels, pad)


def warn_unknown(tokenizer: Any, input_ids: np.ndarray, words: int) -> None:
    """Warn if most of the tokens, special tokens left out, are the unknown token."""
    unknown = 0 if tokenizer.unk_token_id is None else int((input_ids == tokenizer.unk_token_id).sum())
    if 2 * unknown > words:
        log.warning(
            "%.0f %% of the tokens are %s: the tokenizer does not know the language of the texts",
            *(100 * unknown / words, tokenizer.unk_token),
        )


def _encode_part(tokenizer: Any, examples: Examples, part: slice, max_length: int) -> tuple[np.ndarray, ...]:
    """Return ids and token types, (tokens,) int32 each, and lengths, int64, of the examples ``part``."""
    typed = "token_type_ids" in tokenizer.model_input_names
    ids, types, lengths = [], [], []
    for start in range(part.start, part.stop, CHUNK):
        chunk = slice(start, min(start + CHUNK, part.stop))
        encoded = tokenizer(
            examples.text[chunk],
            examples.pair and examples.pair[chunk],
            truncation="longest_first",
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=typed,
        )
        ids += [np.concatenate([np.asarray(row, np.int32) for row in encoded["input_ids"]])]
        if typed:
            types += [np.concatenate([np.asarray(row, np.int32) for row in encoded["token_type_ids"]])]
        lengths += [len(row) for row in encoded["input_ids"]]
    input_ids = np.concatenate(ids)
    return input_ids, np.concatenate(types) if typed else np.zeros_like(input_ids), np.array(lengths, np.int64)


def check_ids(largest: int, vocab_size: int) -> None:
    """Raise `InputError` if the ``largest`` id has no row in an embedding of ``vocab_size`` rows."""
    if largest >= vocab_size:
        raise InputError(
            f"model.path: vocabulary larger than the embedding: the tokenizer gives id {largest}, the embedding has "
            f"{vocab_size} rows; the tokenizer and the weights are of different models"
        )


def ends(folder: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the end-of-text ids in generation_config.json, else in config.json, else of the tokenizer."""
    for name in (GENERATION, MODEL_CONFIG):
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(token) is int and token < 2**31 for token in ids):
                found = shorten(repr(value))
                raise InputError(f"{folder / name}: eos_token_id is {found}; expected a token id, or a list of ids")
            return tuple(dict.fromkeys(token for token in ids if token >= 0))  # some write -1 for none
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def pad_id(tokenizer: Any, ends: Sequence[int]) -> int:
    """Return the padding id of a tokenizer, else an end-of-text id (the attention mask hides padding), else 0."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*ends, 0)[0]
