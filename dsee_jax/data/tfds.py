"""Tasks from TensorFlow Datasets, read without TensorFlow from a prepared folder of ``array_record`` files."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsee_jax.config import DataConfig
from dsee_jax.data.examples import Examples, Task, class_indices, scores
from dsee_jax.data.tables import class_names
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime import multihost, storage

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


def _builder(name: str, folder: str) -> Any:
    """Return the dataset builder; raises `InputError` if it is unknown or its ``array_record`` files do not exist."""
    import tensorflow_datasets as tfds

    if name.startswith("glue/"):
        import tensorflow_datasets.text.glue  # registers the builders; the automatic look-up needs TensorFlow

    if storage.remote(folder):
        # array_record reads local files only; the local copy keeps the folder structure of the store.
        dataset = name.split(":")[0]
        folder = str(storage.download(f"{folder.rstrip('/')}/{dataset}")).removesuffix(dataset)
    try:
        builder = tfds.builder(name, data_dir=folder or None)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise InputError(f"data.task: no TFDS builder {name!r}: {str(error).splitlines()[0]}") from None
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


def _reader(source: Any, columns: Sequence[str]) -> Callable[[slice], list[dict[str, Any]]]:
    def read(part: slice) -> list[dict[str, Any]]:
        rows = source.__getitems__(range(part.start, part.stop))
        return [{column: row[column] for column in columns} for row in rows]

    return read


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _strings(rows: Sequence[Any], column: str, name: str) -> list[str]:
    if rows and not isinstance(rows[0][column], bytes):
        raise InputError(f"data.text, data.pair: {column!r} of {name!r} is no text; choose a text column")
    return [row[column].decode() for row in rows]


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
    features = builder.info.features
    text, pair, label = _COLUMNS.get(config.task, (config.text, config.pair, config.label))
    for key, column in (("text", text), ("pair", pair), ("label", label)):
        if column and column not in features:
            raise InputError(
                f"data.{key}: {config.task!r} has no column {column!r}{did_you_mean(column, features)}; "
                f"it has {', '.join(map(repr, features))}"
            )
    splits = {"train": "train"} | {split: key for split, key in _DEV.items() if split in builder.info.splits}
    if len(splits) == 1:
        raise InputError(f"data.task: {config.task!r} has no split validation; it has {', '.join(builder.info.splits)}")
    rows: dict[str, Sequence[Any]] = {}
    for split in splits:
        source = builder.as_data_source(split)
        parts = multihost.map_shards(len(source), _reader(source, [*filter(None, (text, pair, label))]))
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
            _strings(rows[split], text, config.task),
            _strings(rows[split], pair, config.task) if pair else None,
            class_indices(values[split], classes, where) if classes else scores(values[split], where),
        )

    dev = {key: examples(split) for split, key in splits.items() if split != "train"}
    return Task(short, tuple(classes), examples("train"), dev, glue)
