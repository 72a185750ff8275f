"""Tasks from TensorFlow Datasets, read without TensorFlow from a prepared folder of ``array_record`` files."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsee_jax.ckpt.folders import read_json
from dsee_jax.config import DataConfig
from dsee_jax.data.examples import Examples, Task, class_indices, scores
from dsee_jax.data.tables import class_names
from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.runtime import input_file, multihost, storage

_PAIR = ("sentence1", "sentence2", "label")
_COLUMNS = {  # (text, pair, label) in TFDS, so that GLUE needs no configuration
    "glue/cola": ("sentence", "", "label"),
    "glue/sst2": ("sentence", "", "label"),
    "glue/mrpc": _PAIR,
    "glue/stsb": _PAIR,
    "glue/qqp": ("question1", "question2", "label"),
    "glue/mnli": ("premise", "hypothesis", "label"),
    "glue/qnli": ("question", "sentence", "label"),
    "glue/rte": _PAIR,
    "glue/wnli": _PAIR,
}
_DEV = {"validation": "dev", "validation_matched": "dev_matched", "validation_mismatched": "dev_mismatched"}


_NAME = re.compile(r"\w+(/\w[\w.-]*)?(:\d+\.\d+\.\d+)?")
"""A builder, with its config and version; TFDS itself would also load code of other sites, as for ``huggingface:x``."""

_FEATURES = "tensorflow_datasets.core.features."
"""The classes of features that a folder may name: TFDS imports the module of any name."""


def _builder(name: str, folder: str) -> Any:
    """Return the dataset builder; raises `InputError` if it is unknown or its ``array_record`` files do not exist."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"data.task: {name!r} is no TFDS builder; expected a name such as 'glue/sst2' or 'glue/sst2:2.0.0'"
        )
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils.file_utils import list_data_dirs

    if name.startswith("glue/"):
        import tensorflow_datasets.text.glue  # registers the builders; the automatic look-up needs TensorFlow

    if storage.remote(folder):
        # array_record reads local files only; the local copy keeps the folder structure of the store.
        dataset = name.split(":")[0]
        folder = str(storage.download(f"{folder.rstrip('/')}/{dataset}")).removesuffix(dataset)
    for place in list_data_dirs(given_data_dir=folder or None):
        for file in Path(place, re.split("[/:]", name)[0]).rglob("features.json"):
            _check_features(file)
    try:
        builder = tfds.builder(name, data_dir=folder or None)
    except Exception as error:  # errors of protocol buffers, paths and versions, without a common type
        reason = shorten(" ".join(str(error).split()))
        raise InputError(
            f"data.task: no TFDS builder {name!r} in {folder or 'the default folder'!r}: {reason}"
        ) from None
    if "train" not in builder.info.splits:
        raise InputError(
            f"data.dir: {name!r} is not prepared in {str(builder.data_dir)!r}; prepare it once with "
            f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
        )
    if builder.info.file_format is None or builder.info.file_format.value != "array_record":
        raise InputError(
            f"data.dir: {str(builder.data_dir)!r} holds {getattr(builder.info.file_format, 'value', 'unknown')} files; "
            "prepare the data with file_format='array_record'"
        )
    return builder


def _check_features(file: Path) -> None:
    """Raise `InputError` if a ``features.json`` is damaged, or names a class that is not of TFDS."""
    features = [read_json(file)]
    while features:
        value = features.pop()
        name = value.get("pythonClassName", _FEATURES) if isinstance(value, dict) else _FEATURES
        if not str(name).startswith(_FEATURES):
            raise InputError(f"{file}: the feature {name!r} is no class of {_FEATURES}*; nothing else is imported")
        features += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_shards(builder: Any, split: str) -> None:
    """Raise `InputError` unless every file of a split holds as many records as ``dataset_info.json`` says."""
    from array_record.python.array_record_module import ArrayRecordReader

    info = builder.info.splits[split]
    for path, count in zip(info.filepaths, info.shard_lengths, strict=True):
        input_file.check(Path(path))
        try:
            records = ArrayRecordReader(str(path)).num_records()
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"{path}: no array_record file ({shorten(str(error))}); prepare the data again") from None
        if records != count:
            raise InputError(
                f"{path} has {records} records, and dataset_info.json says {count}; prepare the data again"
            )


def _reader(source: Any, columns: Sequence[str], where: str) -> Callable[[slice], list[dict[str, Any]]]:
    def read(part: slice) -> list[dict[str, Any]]:
        try:
            rows = source.__getitems__(range(part.start, part.stop))
            return [{column: row[column] for column in columns} for row in rows]
        except Exception as error:  # errors of array_record and of protocol buffers, without a common type
            raise InputError(f"{where}: damaged records ({shorten(str(error))}); prepare the data again") from None

    return read


def _text(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _strings(rows: Sequence[Any], column: str, where: Callable[[int], str]) -> list[str]:
    texts = []
    for number, row in enumerate(rows):
        try:
            texts.append(row[column].decode())
        except (AttributeError, UnicodeDecodeError):
            raise InputError(
                f"{where(number)}: {column!r} is no text; choose another column (data.text, data.pair)"
            ) from None
    return texts


def load(config: DataConfig) -> Task:
    """Return the task of the splits train and validation (MNLI: validation_matched and _mismatched) of builder ``data.task``.

    The columns are ``data.text``, ``data.pair`` and ``data.label``; for ``glue/*`` those of TFDS. A floating-point label
    makes the task a regression; a ClassLabel supplies the class names. The task's name is ``rte`` for ``glue/rte``. In a
    distributed run each process reads one part of the records and all-gathers the others.

    Raises:
      InputError: the builder is unknown, not prepared, or not in ``array_record`` files; a column or split is missing; a
        label is outside the task.
    """
    with multihost.raise_on_all():
        builder = _builder(config.task, config.dir)
    import tensorflow_datasets as tfds

    features = builder.info.features
    text, pair, label = _COLUMNS.get(config.task, (config.text, config.pair, config.label))
    for key, column in (("text", text), ("pair", pair), ("label", label)):
        if column and column not in features:
            raise InputError(
                f"data.{key}: {config.task!r} has no column {column!r}{did_you_mean(column, features)}; "
                f"it has {', '.join(map(repr, features))}"
            )
    kind = features[label]
    if not isinstance(kind, tfds.features.Tensor) or kind.shape:  # ClassLabel and Text are tensors
        raise InputError(
            f"data.label: {label!r} of {config.task!r} is {shorten(str(kind))}; expected a class, text or a number"
        )
    splits = {"train": "train"} | {split: key for split, key in _DEV.items() if split in builder.info.splits}
    if len(splits) == 1:
        raise InputError(f"data.task: {config.task!r} has no split validation; it has {', '.join(builder.info.splits)}")
    rows: dict[str, Sequence[Any]] = {}
    with multihost.raise_on_all():
        for split in splits:
            _check_shards(builder, split)
    for split in splits:
        source = builder.as_data_source(split)
        columns = [*filter(None, (text, pair, label))]
        parts = multihost.map_shards(len(source), _reader(source, columns, f"{config.task} {split}"))
        rows[split] = [row for part in parts for row in part]

    names = tuple(getattr(features[label], "names", None) or ())
    values = {
        split: [
            names[row[label]] if names and 0 <= row[label] < len(names) else _text(row[label]) for row in split_rows
        ]
        for split, split_rows in rows.items()
    }
    regression = config.regression or np.issubdtype(features[label].np_dtype, np.floating)
    classes = () if regression else config.labels or names or class_names(values["train"])
    short = config.task.removeprefix("glue/")
    # Other classes than GLUE's, or numbers for classes, make another task of the same texts.
    glue = short if short != config.task and (classes == names if names else regression) else ""

    def examples(split: str) -> Examples:
        def where(index: int) -> str:
            return f"{config.task} {split}[{index}]"

        return Examples(
            _strings(rows[split], text, where),
            _strings(rows[split], pair, where) if pair else None,
            class_indices(values[split], classes, where) if classes else scores(values[split], where),
        )

    dev = {key: examples(split) for split, key in splits.items() if split != "train"}
    return Task(short, tuple(classes), examples("train"), dev, glue=glue)
