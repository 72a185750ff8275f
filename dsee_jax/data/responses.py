"""Prompts and responses as token ids, with a loss weight of 1 on response tokens: the training data of causal-lm."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsee_jax.data.examples import Prompts
from dsee_jax.data.template_limits import limited
from dsee_jax.data.tokens import CHUNK, Tokens, check_ids
from dsee_jax.errors import InputError
from dsee_jax.runtime import multihost


def encode(
    tokenizer: Any, examples: Prompts, *, ends: Sequence[int], vocab_size: int
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each prompt alone, and of its response, which ends with an end of text.

    A text prompt gets the special tokens of the tokenizer, a chat those of its chat template. A response is encoded together
    with its prompt where the joint ids begin with the prompt's own ids, and on its own otherwise. In a distributed run each
    process encodes one part of the examples.

    Args:
      tokenizer: from `load_tokenizer`.
      examples: the prompts and completions.
      ends: end-of-text ids; the first is appended to responses without any of them.
      vocab_size: rows of the model's embedding.

    Raises:
      InputError: a prompt has no tokens, the chat template rejects its messages (with file and line), or an id is not less
        than ``vocab_size``.
    """
    rows = list(zip(*examples, strict=True))
    parts = multihost.map_shards(len(rows), lambda part: _encode_part(tokenizer, rows[part], ends))
    pairs = [pair for part in parts for pair in part]
    check_ids(max(max(map(max, filter(None, pair))) for pair in pairs), vocab_size)
    return pairs


def _encode_part(tokenizer: Any, examples: list[Any], ends: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    pairs: list[tuple[list[int], list[int]]] = []
    # A chat template adds the special tokens itself.
    for chat, group in itertools.groupby(examples, key=lambda each: not isinstance(each[0], str)):
        rows = list(group)
        texts = [_text_pair(tokenizer, *row) for row in rows]
        for start in range(0, len(rows), CHUNK):
            part = texts[start : start + CHUNK]
            own = tokenizer([before for before, _ in part], add_special_tokens=not chat)["input_ids"]
            joint = tokenizer([before + after for before, after in part], add_special_tokens=not chat)["input_ids"]
            for prompt, both, (_, after), (_, _, where) in zip(own, joint, part, rows[start:], strict=False):
                if not prompt:
                    raise InputError(f"{where}: the prompt has no tokens: give some text")
                rest = both[len(prompt) :]
                if both[: len(prompt)] != prompt:
                    rest = tokenizer(after, add_special_tokens=False)["input_ids"]
                pairs.append((prompt, rest if set(rest) & set(ends) else [*rest, *ends[:1]]))
    return pairs


def _text_pair(tokenizer: Any, prompt: str | list[dict[str, Any]], completion: str, where: str) -> tuple[str, str]:
    """Return the texts of a prompt and its response; the chat template formats messages, up to the assistant's turn."""
    if isinstance(prompt, str):
        return prompt, completion
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: messages need a chat template and the tokenizer has none: use prompt and completion"
        )
    chat = [*prompt, {"role": "assistant", "content": completion}]
    try:
        with limited():
            before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            both = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # a template can raise any exception; so can a missing jinja2
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: the tokenizer's chat template rejects these messages ({reason})") from None
    if not both.startswith(before):
        raise InputError(
            f"{where}: the chat template formats these messages differently with an answer: use prompt and completion"
        )
    return before, both[len(before) :]


def to_tokens(
    pairs: Sequence[tuple[list[int], list[int]]], max_length: int, *, pad_id: int, where: Sequence[str]
) -> Tokens:
    """Return the `Tokens` of causal-lm texts, each a prompt and its response; only response tokens have a loss weight of 1.

    Args:
      pairs: from `encode`.
      max_length: the most tokens of a text; a longer response is truncated, with a warning on the logger.
      pad_id: the padding id.
      where: file and line of each pair, for messages.

    Raises:
      InputError: a prompt leaves no room for a token of its response.
    """
    truncated = []
    for (prompt, response), line in zip(pairs, where, strict=True):
        if len(prompt) >= max_length:
            raise InputError(
                f"{line}: the prompt has {len(prompt)} tokens and leaves no room for a response: data.max_length is "
                f"{max_length}; raise it or shorten the prompt"
            )
        if len(prompt) + len(response) > max_length:
            truncated.append(line)
    if truncated:
        more = " ..." if truncated[3:] else ""
        logging.getLogger(__name__).warning(
            "%d of %d responses are truncated at data.max_length = %d tokens, prompt included: %s%s",
            *(len(truncated), len(pairs), max_length, ", ".join(truncated[:3]), more),
        )
    rows = [(prompt + response)[:max_length] for prompt, response in pairs]
    lengths = np.array([len(row) for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([np.asarray(row, np.int32) for row in rows])
    # The label of a position is the next token: the last prompt token predicts the first response token.
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    begins = np.repeat([len(prompt) - 1 for prompt, _ in pairs], lengths)
    learnt = (positions >= begins) & (positions < np.repeat(lengths - 1, lengths))
    return Tokens(ids, np.zeros_like(ids), offsets, np.roll(ids, -1), pad_id, learnt.astype(np.float32))
