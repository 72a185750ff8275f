"""Labelled texts, prompts with completions, and the task they belong to: the result of every data source."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.runtime import input_file, multihost, storage
from dsee_jax.runtime.storage import Place


class Examples(NamedTuple):
    """``n`` texts with their labels."""

    text: list[str]
    """The (first) sentence of each example."""
    pair: list[str] | None
    """The second sentence of each example; None for tasks of single sentences."""
    labels: np.ndarray
    """(n,): int32 index of the class, or float32 for regression. (n, classes) for multi-label classification: float32, 1 for
    the classes of a text, else 0."""


class Prompts(NamedTuple):
    """``n`` prompts with their completions; equal prompts may repeat."""

    prompt: list[str | list[dict[str, Any]]]
    """Each a text, or the messages of a chat, dicts with ``role`` and ``content``."""
    completion: list[str]
    """The text after each prompt; for a chat the content of the assistant's next message."""
    where: list[str]
    """The file and line of each, such as ``train.jsonl:12``, for error messages."""


class TaggedWords(NamedTuple):
    """``n`` texts with a tag for each word."""

    words: list[list[str]]
    """The words of each text, one or more."""
    tags: list[list[int]]
    """The indices of their tags."""
    where: list[str]
    """The file and line of each, such as ``train.conll:12``, for error messages."""


class Texts(NamedTuple):
    """``n`` plain texts."""

    text: list[str]
    where: list[str]
    """The file and line of each, such as ``train.jsonl:12``, for error messages."""


class Questions(NamedTuple):
    """``n`` questions about texts, with answers that stand in the texts, or with none."""

    question: list[str]
    context: list[str]
    """The text of each question."""
    answers: list[list[str]]
    """The right answers of each question; [] where the text has none."""
    starts: list[list[int]]
    """The numbers of characters of the text before each answer."""
    where: list[str]
    """The file and place of each, for error messages."""


Split: TypeAlias = Examples | Prompts | TaggedWords | Texts | Questions
"""The examples of a training or dev set."""


def take(examples: Split, rows: np.ndarray) -> Split:
    """Return the examples ``rows``, int (n,), in this order."""
    columns: Any = examples
    kind: Any = type(examples)
    return kind(
        *(
            column[rows] if isinstance(column, np.ndarray) else column and [column[r] for r in rows]
            for column in columns
        )
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """Training examples, dev sets and class names."""

    name: str
    """``rte``, ``toy``, ..., for a person; tables of your own may have any name."""
    labels: tuple[str, ...]
    """The names of classes or tags by index, as the data or the checkpoint write them; start and end for questions; empty for
    regression and causal-lm."""
    train: Split
    dev: Mapping[str, Split]
    """Dev sets by name: ``dev``, or ``dev_matched`` and ``dev_mismatched`` for MNLI. With ``data.split_dev`` the validation
    halves, which choose the best evaluation."""
    scoring: Mapping[str, Split] = dataclasses.field(default_factory=dict)
    """The test halves of the dev sets, by the same names, which score the chosen model; empty without ``data.split_dev``."""
    glue: str = ""
    """The task of GLUE, which decides the metrics; empty for data from elsewhere, whatever their name."""

    @property
    def causal(self) -> bool:
        """Whether the task is to generate text (causal-lm)."""
        return isinstance(self.train, Prompts | Texts)

    @property
    def regression(self) -> bool:
        """Whether the labels are numbers."""
        return self.problem == "regression"

    @property
    def problem(self) -> str:
        """The kind of the task, which decides its loss and its metrics: `problem_type`, or the task of the model."""
        if isinstance(self.train, TaggedWords):
            return "token-classification"
        if isinstance(self.train, Questions):
            return "question-answering"
        return self.problem_type or "causal-lm"

    @property
    def problem_type(self) -> str:
        """Hugging Face's name of the loss of sequence classification; empty for other tasks."""
        if not isinstance(self.train, Examples):
            return ""
        if self.train.labels.ndim == 2:
            return "multi_label_classification"
        return "single_label_classification" if self.labels else "regression"

    @property
    def num_labels(self) -> int:
        """The width of a classifier: the number of classes, 1 for regression."""
        return len(self.labels) or 1


def read_text(path: Place) -> str:
    """Return the UTF-8 text of a file, without a byte-order mark; raises `InputError` if it is unreadable or empty.

    In a distributed run each process reads one part of the bytes and all-gathers the others.
    """
    try:
        text = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected examples")
    return text


def _bytes(path: Place) -> bytes:
    if not multihost.is_distributed():
        input_file.check(path)
        with _readable(path):
            return path.read_bytes()
    with multihost.raise_on_all(), _readable(path):
        size = storage.size(path)
    multihost.assert_equal("data", {f"the size of {path}": size})

    def read(part: slice) -> bytes:
        with _readable(path), path.open("rb") as file:
            file.seek(part.start)
            content = bytes(file.read(part.stop - part.start))
        if len(content) < part.stop - part.start:
            raise InputError(f"{path} is shorter than at the start of the read: another program changes the file")
        return content

    return b"".join(multihost.map_shards(size, read))


@contextlib.contextmanager
def _readable(path: Place) -> Iterator[None]:
    """Raise `InputError` for an OSError or store error."""
    try:
        with storage.store_errors(path):
            yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a readable file") from None


def class_indices(values: Sequence[str], classes: Sequence[str], where: Callable[[int], str]) -> np.ndarray:
    """Return the index of each value in ``classes``, int32 (n,).

    Raises `InputError` for a value that is no class; ``where(i)`` is the location of value ``i`` in the message, for
    instance ``train.tsv:12``.
    """
    index = {name: number for number, name in enumerate(classes)}
    for number, value in enumerate(values):
        if value not in index:
            listed = ", ".join(map(repr, classes[:10])) + (", ..." if len(classes) > 10 else "")
            raise InputError(
                f"{where(number)}: label {shorten(repr(value))} is outside the task; expected one of {listed}"
                f"{did_you_mean(value, classes)}"
            )
    return np.array([index[value] for value in values], np.int32)


def scores(
    values: Sequence[str], where: Callable[[int], str], bounds: tuple[float, float] = (-np.inf, np.inf)
) -> np.ndarray:
    """Return the values as numbers, float32 (n,); raises `InputError` for a value that is not finite or outside ``bounds``."""
    low, high = bounds
    numbers = np.empty(len(values), np.float32)
    for number, value in enumerate(values):
        try:
            score = float(value)
        except ValueError:
            shown = shorten(repr(value))
            raise InputError(f"{where(number)}: label {shown} is not a number; the task is a regression") from None
        if not (abs(score) <= float(np.finfo(np.float32).max) and low <= score <= high):
            raise InputError(
                f"{where(number)}: label {value!r} is outside the task; expected a number from {low} to {high}"
            )
        numbers[number] = score
    return numbers
