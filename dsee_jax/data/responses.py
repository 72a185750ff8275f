"""Prompts and responses to token ids: what a decoder is tuned on, and what of it counts."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsee_jax.data.examples import Prompts
from dsee_jax.data.tokens import CHUNK, Tokens, check_ids
from dsee_jax.errors import InputError
from dsee_jax.runtime import multihost


def encode(
    tokenizer: Any, examples: Prompts, *, ends: Sequence[int], vocab_size: int
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each prompt, as if nothing followed, and of what follows, with an end of text behind it.

    Of several processes each does a part of them.

    A prompt of text gets the special tokens of the tokenizer, one of messages those of its chat template. What follows is
    encoded together with the prompt where that leaves the prompt's tokens as they are, and alone elsewhere.

    Args:
      tokenizer: from `load_tokenizer`.
      examples: the prompts.
      ends: the first is put behind what has none of them.
      vocab_size: rows of the model's embedding.

    Raises:
      InputError: with file and line: a prompt has no tokens, or its messages cannot be written by the chat template; an id
        is not below ``vocab_size``.
    """
    rows = list(zip(*examples, strict=True))
    parts = multihost.map_shards(len(rows), lambda part: _encoded(tokenizer, rows[part], ends))
    found = [pair for part in parts for pair in part]
    check_ids(max(max(map(max, filter(None, pair))) for pair in found), vocab_size)
    return found


def _encoded(tokenizer: Any, examples: list[Any], ends: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    found: list[tuple[list[int], list[int]]] = []
    # Messages bring their special tokens with them.
    for chat, group in itertools.groupby(examples, key=lambda each: not isinstance(each[0], str)):
        rows = list(group)
        texts = [_written(tokenizer, *row) for row in rows]
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
                found.append((prompt, rest if set(rest) & set(ends) else [*rest, *ends[:1]]))
    return found


def _written(tokenizer: Any, prompt: str | list[dict[str, Any]], completion: str, where: str) -> tuple[str, str]:
    """Return the text of a prompt, of messages up to where the assistant begins, and what follows as the template has it."""
    if isinstance(prompt, str):
        return prompt, completion
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: messages need a chat template and the tokenizer has none: give prompt and completion"
        )
    whole = [*prompt, {"role": "assistant", "content": completion}]
    try:
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        both = tokenizer.apply_chat_template(whole, tokenize=False)
    except Exception as error:  # whatever a template raises, and the lack of jinja2
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: the tokenizer's chat template does not take these messages ({reason})") from None
    if not both.startswith(before):
        raise InputError(
            f"{where}: the chat template writes these messages otherwise when an answer follows: give prompt and completion"
        )
    return before, both[len(before) :]


def lay(pairs: Sequence[tuple[list[int], list[int]]], max_length: int, *, pad_id: int, where: Sequence[str]) -> Tokens:
    """Return the `Tokens` of texts to write: each a prompt and what follows it, of which the responses alone are learnt.

    Args:
      pairs: from `encode`.
      max_length: the most tokens of a text; the end of a longer response is cut, which is said on the logger.
      pad_id: the id to fill up with.
      where: the place of each, for messages.

    Raises:
      InputError: a prompt that leaves no room for a token of its response.
    """
    cut = []
    for (prompt, response), place in zip(pairs, where, strict=True):
        if len(prompt) >= max_length:
            raise InputError(
                f"{place}: the prompt has {len(prompt)} tokens and leaves no room for a response: data.max_length is "
                f"{max_length}; raise it or shorten the prompt"
            )
        if len(prompt) + len(response) > max_length:
            cut.append(place)
    if cut:
        logging.getLogger(__name__).warning(
            "%d of %d responses are cut at data.max_length = %d tokens, prompt included: %s%s",
            *(len(cut), len(pairs), max_length, ", ".join(cut[:3]), " ..." if cut[3:] else ""),
        )
    rows = [(prompt + response)[:max_length] for prompt, response in pairs]
    lengths = np.array([len(row) for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([np.asarray(row, np.int32) for row in rows])
    # The last token of the prompt is the first that something is learnt from, the last of all the first that nothing is.
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    begins = np.repeat([len(prompt) - 1 for prompt, _ in pairs], lengths)
    learnt = (positions >= begins) & (positions < np.repeat(lengths - 1, lengths))
    return Tokens(ids, np.zeros_like(ids), offsets, np.roll(ids, -1), pad_id, learnt.astype(np.float32))
