"""Texts to token ids by a Hugging Face fast tokenizer, ragged: no padding is kept."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt.folders import GENERATION, read_json
from dsee_jax.data.examples import Examples
from dsee_jax.errors import InputError
from dsee_jax.runtime import multihost

CHUNK = 8192  # examples encoded at once, which bounds the memory that Python lists take


class Tokens(NamedTuple):
    """Tokenised examples laid end to end: example ``i`` is ``input_ids[offsets[i]:offsets[i + 1]]``."""

    input_ids: np.ndarray
    """(tokens,) int32."""
    token_type_ids: np.ndarray
    """(tokens,) int32: 1 in the second sentence where the model tells sentences apart, else 0."""
    offsets: np.ndarray
    """(n + 1,) int64."""
    labels: np.ndarray
    """(n,): int32 classes or float32 scores; of texts to write (tokens,) int32: the token that follows each."""
    pad_id: int
    """The id to fill up with."""
    weights: np.ndarray | None = None
    """Of texts to write, (tokens,) float32: 1 where the token that follows is of a response, else 0."""
    segments: np.ndarray | None = None
    """Of packed texts, (tokens,) int32: the number of a token's text in its row, from 1; None: a text a row."""

    @property
    def size(self) -> int:
        """n, how many examples there are; of packed texts, rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each example."""
        return np.diff(self.offsets)


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """Open the fast tokenizer of a Hugging Face folder or hub id; raises `InputError` if there is none."""
    # Its advice to install PyTorch is none to a program that only needs the tokenizer; it is given at the import.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # a malformed tokenizer.json is a bare Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.path: no tokenizer in {str(path)!r}; expected tokenizer.json or vocab.txt beside config.json ({reason})"
        ) from None


def tokenize(tokenizer: Any, examples: Examples, max_length: int, *, vocab_size: int) -> Tokens:
    """Encode texts, or pairs of texts, with the tokenizer's special tokens; of several processes each does a part of them.

    Args:
      tokenizer: from `load_tokenizer`.
      examples: ``n`` of them.
      max_length: the most tokens of one example, special ones included; the longer sentence of a pair is cut first.
      vocab_size: rows of the model's embedding.

    Returns:
      The `Tokens` of the ``n`` examples, in their order.

    Raises:
      InputError: ``max_length`` leaves no room for text, or an id is not below ``vocab_size``.
    """
    special = tokenizer.num_special_tokens_to_add(pair=examples.pair is not None)
    if max_length <= special:
        raise InputError(f"data.max_length: {max_length} leaves no room for text; special tokens alone take {special}")
    encoded = multihost.map_shards(len(examples.text), lambda part: _encoded(tokenizer, examples, part, max_length))
    input_ids, token_type_ids, lengths = map(np.concatenate, zip(*encoded, strict=True))
    check_ids(int(input_ids.max()), vocab_size)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(input_ids, token_type_ids, offsets, examples.labels, tokenizer.pad_token_id or 0)


def _encoded(tokenizer: Any, examples: Examples, part: slice, max_length: int) -> tuple[np.ndarray, ...]:
    """Return the ids, the token types and the lengths of some examples."""
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
    """Raise `InputError` for an id that the embedding has no row for."""
    if largest >= vocab_size:
        raise InputError(
            f"model.path: vocabulary larger than the embedding: the tokenizer gives id {largest}, the embedding has "
            f"{vocab_size} rows; the tokenizer and the weights are of different models"
        )


def ends(folder: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the ends of text that the first of generation_config.json, config.json and the tokenizer names."""
    for name in (GENERATION, "config.json"):
        found = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def padding(tokenizer: Any, ends: Sequence[int]) -> int:
    """Return the id to pad with; a tokenizer without one pads with the end of text, which no mask lets through."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*ends, 0)[0]
