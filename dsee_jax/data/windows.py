"""Token ids of questions with their texts, in overlapping windows where a text is longer than a row."""

from typing import Any

import numpy as np

from dsee_jax.data.examples import Questions
from dsee_jax.data.tokens import CHUNK, Tokens, Windows, check_ids, warn_unknown
from dsee_jax.errors import InputError
from dsee_jax.runtime import multihost


def tokenize(tokenizer: Any, examples: Questions, max_length: int, *, stride: int, vocab_size: int) -> Tokens:
    """Return the `Tokens` of all windows; each row is a question and a window of its text.

    The labels (windows, 2) int32 are the first and last token of the first answer; 0, the first token of the row, where the
    question has no answer or the window does not hold the whole answer (Devlin et al. 2019, section 4.2). In a distributed run
    each process encodes one part of the questions.

    Args:
      tokenizer: from `load_tokenizer`; a fast one.
      examples: ``n`` questions.
      max_length: the most tokens of a row, special tokens included.
      stride: the tokens that consecutive windows share.
      vocab_size: rows of the model's embedding.

    Raises:
      InputError: a question leaves no room for more than ``stride`` tokens of its text, a text has no token, or an id is not
        less than ``vocab_size``.
    """
    parts = multihost.map_shards(
        len(examples.question), lambda part: _encode_part(tokenizer, examples, part, max_length, stride)
    )
    ids, types, spans, labels, questions, lengths = map(np.concatenate, zip(*parts, strict=True))
    pad = tokenizer.pad_token_id or 0
    check_ids(max(int(ids.max()), pad), vocab_size)
    warn_unknown(tokenizer, ids, len(ids))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(ids, types, offsets, labels, pad, windows=Windows(questions, spans))


def _encode_part(
    tokenizer: Any, examples: Questions, part: slice, max_length: int, stride: int
) -> tuple[np.ndarray, ...]:
    """Return ids, types, spans, labels, questions and lengths of the windows of the questions ``part``."""
    typed = "token_type_ids" in tokenizer.model_input_names
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride
    columns: tuple[list[Any], ...] = ([], [], [], [], [], [])
    for start in range(part.start, part.stop, CHUNK):
        chunk = slice(start, min(start + CHUNK, part.stop))
        alone = tokenizer(examples.question[chunk], add_special_tokens=False, verbose=False)["input_ids"]
        for number, question in enumerate(alone, start):
            if len(question) >= room:
                raise InputError(
                    f"{examples.where[number]}: the question has {len(question)} tokens; data.max_length {max_length} and "
                    f"data.stride {stride} leave room for {room - 1}: raise data.max_length or lower data.stride"
                )
        encoded = tokenizer(
            examples.question[chunk],
            examples.context[chunk],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=typed,
        )
        for row, own in enumerate(encoded["overflow_to_sample_mapping"]):
            tokens, number = np.asarray(encoded["input_ids"][row], np.int32), start + own
            inside = np.array([part == 1 for part in encoded.sequence_ids(row)])
            spans = np.where(inside[:, None], np.asarray(encoded["offset_mapping"][row], np.int32), -1)
            if not inside.any():
                raise InputError(f"{examples.where[number]}: its text has no token that the tokenizer knows")
            answer = zip(examples.starts[number], examples.answers[number], strict=True)
            begin, text = next(answer, (0, ""))
            types = np.asarray(encoded["token_type_ids"][row], np.int32) if typed else np.zeros_like(tokens)
            label = _answer(spans, begin, begin + len(text))
            for column, value in zip(columns, (tokens, types, spans, label, [number], [len(tokens)]), strict=True):
                column.append(value)
    ids, types, spans, labels, questions, lengths = columns
    return (*map(np.concatenate, (ids, types, spans)), np.stack(labels), *map(np.concatenate, (questions, lengths)))


def _answer(spans: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Return the first and last token of the characters ``begin`` to ``end``, (2,) int32; 0 where they are not all inside."""
    first = np.flatnonzero((spans[:, 0] <= begin) & (spans[:, 1] > begin))
    last = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] >= end))
    whole = len(first) and len(last)
    return np.array([first[0], last[-1]] if whole else [0, 0], np.int32)
