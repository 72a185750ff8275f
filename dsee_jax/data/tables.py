"""Your own tasks: a folder with ``train.csv`` and ``dev.csv``, or ``train.jsonl`` and ``dev.jsonl``."""

import collections
import contextlib
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.config import DataConfig
from dsee_jax.data.examples import Examples, Task, class_indices, read_text, scores
from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.runtime import multihost, storage
from dsee_jax.runtime.storage import Place


class _Columns(NamedTuple):
    """The configured columns of one file as text, and the line number of each row."""

    text: list[str]
    pair: list[str] | None
    label: list[list[str]]  # one per row, any number with data.multi_label
    lines: list[int]


def _csv_rows(path: Place) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 kB refuses long texts
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header: list[str] = []
    try:
        for row in reader:
            if row and not header:
                header = row
                if repeated := [name for name, count in collections.Counter(header).items() if count > 1]:
                    raise InputError(f"{path}:1: the column {repeated[0]!r} is repeated; rename one")
            elif row and len(row) != len(header):
                raise InputError(
                    f"{path}:{reader.line_num}: the row has {len(row)} columns, expected {len(header)} separated by "
                    f"commas: {', '.join(header)}"
                )
            elif row:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _jsonl_rows(path: Place) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda name: None)  # programs write a missing value as NaN
            if "\\ud" in line.lower():  # half of a pair of escapes is no text
                json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nested too deep; no text
            raise InputError(f"{path}:{number}: not JSON: {shorten(str(error))}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected one JSON object per line, found {line[:40]!r}")
        yield number, row


def rows(path: Place, source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield ``(line number, {column: value})`` of a csv or jsonl file; raises `InputError` with the file and line."""
    return _jsonl_rows(path) if source == "jsonl" else _csv_rows(path)


def label_text(value: Any, where: str, column: str) -> str:
    """Return the text of a label of a JSON value; raises `InputError` for null, a list, an object or blank text."""
    text = value if isinstance(value, str) else json.dumps(value)
    if value is None or isinstance(value, list | dict) or not text.strip():
        raise InputError(f"{where}: the label {column!r} is {shorten(text)!r}; expected text, a number, true or false")
    return text


def _labels(value: Any, where: str, config: DataConfig) -> list[str]:
    """Return the labels of a row: one, or any number with ``data.multi_label``."""
    if not config.multi_label:
        return [label_text(value, where, config.label)]
    if isinstance(value, str):
        value = [name for each in value.split(config.label_separator) if (name := each.strip())]
    return [label_text(each, where, config.label) for each in (value if isinstance(value, list) else [value])]


def _columns(path: Place, config: DataConfig) -> _Columns:
    columns = _Columns([], [] if config.pair else None, [], [])
    targets: list[tuple[str, str, list[Any]]] = [
        ("text", config.text, columns.text),
        ("label", config.label, columns.label),
    ]
    if columns.pair is not None:
        targets.append(("pair", config.pair, columns.pair))
    for line, row in rows(path, config.source):
        for key, column, values in targets:
            value = row.get(column)
            if value is None or (key != "label" and not isinstance(value, str)):
                missing = " but null, a missing value" if value is None else ""
                problem = f"{column!r} is no text{missing}"
                if column not in row:
                    problem = f"no column {column!r}{did_you_mean(column, row)}"
                raise InputError(f"{path}:{line}: {problem}; set data.{key} to one of {', '.join(map(repr, row))}")
            values.append(_labels(value, f"{path}:{line}", config) if key == "label" else value)
        columns.lines.append(line)
    if not columns.lines:
        raise InputError(f"{path}: no rows; expected labelled examples")
    return columns


def class_names(values: Sequence[str]) -> tuple[str, ...]:
    """Return the different values, sorted as numbers if all are integers, else as text."""
    names = set(values)
    if all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def check_different(path: str, names: Sequence[str]) -> None:
    """Raise `InputError` if one class has two spellings, or a name is a missing value."""
    spelled: dict[str | float, str] = {}
    for name in names:
        key: str | float = name.strip().casefold()
        with contextlib.suppress(ValueError):
            key = float(key)
        way = "or, if that is meant, list all classes in data.labels"
        if key != key:
            raise InputError(f"{path}: the label {name!r} stands for a missing value: delete its rows, {way}")
        if (other := spelled.setdefault(key, name)) != name:
            raise InputError(
                f"{path}: the labels {other!r} and {name!r} differ only in spaces, in case or in the spelling of a number: "
                f"write one of them, {way}"
            )


@multihost.raise_on_all()
def files(config: DataConfig, train: Sequence[str] = (), dev: Sequence[str] = ()) -> dict[str, Place]:
    """Return the paths of the train and dev files in ``data.dir``.

    These are ``data.train_file`` and ``data.dev_file`` where set, else the first file of ``train`` and of ``dev`` that exists;
    by default those with the ending of the source. Raises `InputError` for a folder or file that does not exist.
    """
    kind = config.source
    train, dev = train or [f"train.{kind}"], dev or [f"dev.{kind}", f"validation.{kind}"]
    folder, files = storage.as_path(config.dir), {}
    with storage.store_errors(folder):
        exists = folder.is_dir()
    if not exists:
        raise InputError(f"data.dir: no folder {str(folder)!r}; set data.dir to the folder with {train[0]}")
    for split, chosen, defaults in (("train", config.train_file, train), ("dev", config.dev_file, dev)):
        paths = [folder / name for name in ([chosen] if chosen else defaults)]
        with storage.store_errors(folder):
            files[split] = next((path for path in paths if path.is_file()), None)
        if files[split] is None:
            key = f"data.{split}_file" if chosen else "data.dir"
            raise InputError(f"{key}: no file {' or '.join(map(str, paths))}")
    return files


def load(config: DataConfig) -> Task:
    """Return the task of the train and dev (or validation) files in ``data.dir``, named ``data.task``.

    ``data.text``, ``data.pair`` and ``data.label`` name the columns. A JSON label that is no string stands for its JSON
    text, such as ``1`` or ``true``. With ``data.multi_label`` a row has a list of labels.

    Raises:
      InputError: a file is missing, empty or malformed, a column is missing, a label is outside ``data.labels`` (or outside
        the labels of the training file), or the training labels are less than two; the message has the file and line.
    """
    paths = files(config)
    columns = {split: _columns(path, config) for split, path in paths.items()}
    used = [name for names in columns["train"].label for name in names]
    classes = () if config.regression else config.labels or class_names(used)
    if not config.labels:
        check_different(str(paths["train"]), classes)
    if len(classes) < 2 and not config.regression:
        found = f"every label is {classes[0]!r}" if classes else f"no row has a label in {config.label!r}"
        other = "" if config.multi_label else ", or data.regression: true"
        raise InputError(f"{paths['train']}: {found}; a task needs two classes{other}")

    def examples(split: str) -> Examples:
        text, pair, label, lines = columns[split]

        rows = [row for row, names in enumerate(label) for _ in names]
        flat = [name for names in label for name in names]

        def where(index: int) -> str:
            return f"{paths[split]}:{lines[rows[index]]}"

        if config.regression:
            return Examples(text, pair, scores(flat, where))
        indices = class_indices(flat, classes, where)
        if not config.multi_label:
            return Examples(text, pair, indices)
        labels = np.zeros((len(text), len(classes)), np.float32)
        labels[rows, indices] = 1
        return Examples(text, pair, labels)

    return Task(config.task, tuple(classes), examples("train"), {"dev": examples("dev")})
