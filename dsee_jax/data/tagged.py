"""Texts with a tag for each word: JSON lines, or the columns of the CoNLL shared tasks.

A JSON line is ``{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}``. A CoNLL file has one word per line, its tag in the
last column, columns separated by spaces or tabs, and an empty line after each text; lines of ``-DOCSTART-`` are left out.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from dsee_jax.config import DataConfig
from dsee_jax.data import tables
from dsee_jax.data.examples import TaggedWords, Task, class_indices, read_text
from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.metrics import entities
from dsee_jax.runtime.storage import Place

_DOCUMENT = "-DOCSTART-"


def load(config: DataConfig) -> Task:
    """Return the task of the train and dev files in ``data.dir``, named ``data.task``.

    Raises:
      InputError: a file is missing, empty or malformed, the words and tags of a text differ in number, a tag is outside
        ``data.labels`` (or outside the tags of the training file), or tags of entities are not IOB2; the message has the file
        and line.
    """
    kind = config.source
    if kind == "conll":
        paths = tables.files(config, ["train.conll", "train.txt"], ["dev.conll", "dev.txt", "valid.txt"])
        read = _conll
    else:
        paths = tables.files(config)
        read = _lines
    texts = {split: [*read(path)] for split, path in paths.items()}
    for split, path in paths.items():
        if not texts[split]:
            raise InputError(f"{path}: no texts; expected words with tags")
    names: Sequence[str] = config.labels or tables.class_names([tag for _, _, tags in texts["train"] for tag in tags])
    if not config.labels:
        tables.check_different(str(paths["train"]), names)
    if len(names) < 2:
        raise InputError(f"{paths['train']}: every tag is {next(iter(names))!r}; a task needs two")
    try:
        entities.is_iob(names)
    except InputError as error:
        raise InputError(f"{paths['train']}: {error}") from None
    splits = {split: _examples(rows, names) for split, rows in texts.items()}
    return Task(config.task, tuple(names), splits["train"], {"dev": splits["dev"]})


def _examples(texts: list[tuple[str, list[str], list[str]]], names: Any) -> TaggedWords:
    places = [where for where, _, tags in texts for _ in tags]
    flat = iter(class_indices([tag for _, _, tags in texts for tag in tags], names, places.__getitem__).tolist())
    indices = [[next(flat) for _ in tags] for _, _, tags in texts]
    return TaggedWords([words for _, words, _ in texts], indices, [where for where, _, _ in texts])


def _lines(path: Place) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (file and line, words, tags) of JSON lines."""
    for line, row in tables.rows(path, "jsonl"):
        where, columns = f"{path}:{line}", []
        for name in ("tokens", "tags"):
            if name not in row:
                near = did_you_mean(name, row.keys() - {"tokens", "tags"})
                raise InputError(
                    f"{where}: no {name!r}{near}; expected tokens and tags, found {', '.join(map(repr, row))}"
                )
            if not isinstance(row[name], list) or not row[name]:
                raise InputError(f"{where}: {name!r} is {shorten(repr(row[name]))}; expected a list of one or more")
            columns.append(row[name])
        words, tags = columns
        if len(words) != len(tags):
            raise InputError(f"{where}: {len(words)} tokens and {len(tags)} tags; expected a tag for each token")
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise InputError(
                    f"{where}: the token {shorten(repr(word))} is no word; expected a string that is not blank"
                )
        yield where, words, [tables.label_text(tag, where, "tags") for tag in tags]


def _conll(path: Place) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (file and line of the first word, words, tags) of a CoNLL file."""
    begin, words, tags, width = 1, [], [], 0
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
        columns = line.split()
        if columns and columns[0] != _DOCUMENT:
            width = width or len(columns)
            if len(columns) < 2 or len(columns) != width:
                expected = max(width, 2)
                raise InputError(
                    f"{path}:{number}: {len(columns)} columns in {shorten(repr(line))}; expected {expected}: a word first, "
                    "its tag last, and an empty line after each text"
                )
            begin = begin if words else number
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            yield f"{path}:{begin}", words, tags
            words, tags = [], []
