"""Questions with answers in a text, from files in the layout of SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250) or v2.0
(Rajpurkar, Jia and Liang 2018, arXiv 1806.03822), where a question may have ``"is_impossible": true`` and no answers.

::

    {"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "...", "question": "...",
        "answers": [{"text": "...", "answer_start": 17}]}]}]}]}
"""

import json
from typing import Any

from dsee_jax.config import DataConfig
from dsee_jax.data import tables
from dsee_jax.data.examples import Questions, Task, read_text
from dsee_jax.errors import InputError, shorten
from dsee_jax.runtime.storage import Place

_ENDS = (".json", "-v1.1.json", "-v2.0.json")
"""The ends of the names of the files."""


def load(config: DataConfig) -> Task:
    """Return the task of the train and dev files in ``data.dir``, named ``data.task``.

    Raises:
      InputError: a file is missing or not of this layout, a question has no answer and is not said to have none, or the text
        has another answer at its place; the message has the file and the place of the question.
    """
    paths = tables.files(config, [f"train{end}" for end in _ENDS], [f"dev{end}" for end in _ENDS])
    return Task(config.task, ("start", "end"), _read(paths["train"]), {"dev": _read(paths["dev"])})


def _read(path: Place) -> Questions:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {shorten(str(error))}") from None
    questions = Questions([], [], [], [], [])
    for article, at in _items(content, "data", str(path)):
        for paragraph, place in _items(article, "paragraphs", at):
            context = _text(paragraph, "context", place)
            for row, where in _items(paragraph, "qas", place):
                _add(questions, context, row, where)
    if not questions.question:
        raise InputError(f"{path}: no questions; expected some in the layout of SQuAD v1.1")
    return questions


def _add(questions: Questions, context: str, row: Any, where: str) -> None:
    """Add a question with its answers."""
    question, texts, starts = _text(row, "question", where), [], []
    for answer, place in _items(row, "answers", where):
        text, start = _text(answer, "text", place), answer.get("answer_start")
        if type(start) is not int or context[start : start + len(text)] != text or start < 0:
            raise InputError(
                f"{place}: the answer {shorten(repr(text))} does not stand at answer_start {shorten(repr(start))} of the "
                "context; expected the number of characters before it"
            )
        texts.append(text)
        starts.append(start)
    if bool(texts) == (row.get("is_impossible") is True):
        raise InputError(
            f"{where}: {len(texts)} answers, and is_impossible is {shorten(repr(row.get('is_impossible')))}; expected one "
            "answer or more, or, as in SQuAD v2.0, none and is_impossible: true"
        )
    row_of: tuple[Any, ...] = (question, context, texts, starts, where)
    for column, value in zip(questions, row_of, strict=True):
        column.append(value)


def _items(value: Any, key: str, where: str) -> list[tuple[Any, str]]:
    """Return the items of the list ``value[key]``, each with its place for messages."""
    items = value.get(key) if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise InputError(f"{where}: no list {key!r}; expected the layout of SQuAD v1.1")
    return [(item, f"{where}: {key}[{number}]") for number, item in enumerate(items)]


def _text(value: Any, key: str, where: str) -> str:
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {key!r} is {shorten(repr(text))}; expected a text that is not blank")
    return text
