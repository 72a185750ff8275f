"""Labelled texts and the task they belong to: what every source of data makes."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime import multihost, storage
from dsee_jax.runtime.storage import Place


class Examples(NamedTuple):
    """Texts with their labels, ``n`` of them."""

    text: list[str]
    """The (first) sentence of each."""
    pair: list[str] | None
    """The second sentence of each, or None where the task has one sentence."""
    labels: np.ndarray
    """(n,): int32 index of the class, or float32 for regression."""


class Prompts(NamedTuple):
    """Prompts with what is to follow them, ``n`` of them; a prompt may come more than once."""

    prompt: list[str | list[dict[str, Any]]]
    """Texts, or the messages of chats so far, each with ``role`` and ``content``."""
    completion: list[str]
    """What follows; after messages, the content of the assistant's next one."""
    where: list[str]
    """``train.jsonl:12``: where each stands, for messages."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be learnt, and what it is measured on."""

    name: str
    """``rte``, ``toy``, ...: what the metrics go by."""
    labels: tuple[str, ...]
    """The class names in the order of their index; empty for regression and causal-lm."""
    train: Examples | Prompts
    dev: Mapping[str, Examples | Prompts]
    """Under ``dev``; MNLI has ``dev_matched`` and ``dev_mismatched``."""

    @property
    def causal(self) -> bool:
        """Whether the task is to write."""
        return isinstance(self.train, Prompts)

    @property
    def regression(self) -> bool:
        """Whether the label is a number to predict."""
        return not self.labels and not self.causal

    @property
    def num_labels(self) -> int:
        """The width of a classifier: the number of classes, 1 for regression."""
        return len(self.labels) or 1


def read_text(path: Place) -> str:
    """Return the UTF-8 text of a file, without a byte-order mark; raises `InputError` if it cannot be read or is empty.

    Of several processes each reads a part of its bytes, which they exchange.
    """
    try:
        text = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected labelled examples")
    return text


def _bytes(path: Place) -> bytes:
    if not multihost.is_distributed():
        with _readable(path):
            return path.read_bytes()
    with multihost.raise_on_all(), _readable(path):
        size = storage.size(path)
    multihost.assert_equal("data", {f"the size of {path}": size})

    def read(part: slice) -> bytes:
        with _readable(path), path.open("rb") as file:
            file.seek(part.start)
            held = bytes(file.read(part.stop - part.start))
        if len(held) < part.stop - part.start:
            raise InputError(f"{path} ends early: it changes while it is read")
        return held

    return b"".join(multihost.map_shards(size, read))


@contextlib.contextmanager
def _readable(path: Place) -> Iterator[None]:
    try:
        with storage.store_errors(path):
            yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; a readable file is needed here") from None


def class_indices(values: Sequence[str], classes: Sequence[str], where: Callable[[int], str]) -> np.ndarray:
    """Return int32 (n,): the index of each value in ``classes``.

    ``where(i)`` names the place of value ``i``, for instance ``train.tsv:12``, for the `InputError` that is raised when
    it is not one of the classes.
    """
    index = {name: number for number, name in enumerate(classes)}
    for number, value in enumerate(values):
        if value not in index:
            listed = ", ".join(map(repr, classes[:10])) + (", ..." if len(classes) > 10 else "")
            raise InputError(
                f"{where(number)}: label {value!r} is outside the task; expected one of {listed}"
                f"{did_you_mean(value, classes)}"
            )
    return np.array([index[value] for value in values], np.int32)


def scores(
    values: Sequence[str], where: Callable[[int], str], bounds: tuple[float, float] = (-np.inf, np.inf)
) -> np.ndarray:
    """Return float32 (n,): the values as numbers; one that is not a finite number within ``bounds`` is an `InputError`."""
    low, high = bounds
    numbers = np.empty(len(values), np.float32)
    for number, value in enumerate(values):
        try:
            numbers[number] = float(value)
        except ValueError:
            raise InputError(f"{where(number)}: label {value!r} is not a number; the task is a regression") from None
        if not (np.isfinite(numbers[number]) and low <= numbers[number] <= high):
            raise InputError(
                f"{where(number)}: label {value!r} is outside the task; expected a number from {low} to {high}"
            )
    return numbers
