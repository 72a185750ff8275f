"""The nine GLUE tasks in their original TSV layout (Wang et al., 2019): tab-separated columns, quotes are plain text."""

import logging
from typing import NamedTuple

from dsee_jax.data.examples import Examples, Task, class_indices, read_text, scores
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime import multihost, storage
from dsee_jax.runtime.storage import Place


class Layout(NamedTuple):
    """The file layout of one task."""

    folder: str
    """The name of the task's folder in GLUE."""
    text: str
    """The column of the (first) sentence."""
    pair: str
    """The column of the second sentence; empty for tasks of single sentences."""
    label: str
    """The column of the label."""
    values: tuple[str, ...] = ()
    """The label values of the files, by class index; empty for regression."""
    labels: tuple[str, ...] = ()
    """The class names, where the label values are numbers."""
    columns: tuple[str, ...] = ()
    """The columns of files without a header line."""
    dev: tuple[str, ...] = ("dev",)
    """The names of the dev files."""
    bounds: tuple[float, float] = (0.0, 0.0)
    """The range of a regression label."""
    torn: float = 0.0
    """The tolerated fraction of incomplete rows, from line breaks inside sentences; such rows are skipped with a warning."""


_ENTAILMENT = ("entailment", "not_entailment")
_BINARY = ("0", "1")

LAYOUTS = {
    "cola": Layout(
        "CoLA",
        *("sentence", "", "label"),
        values=_BINARY,
        labels=("unacceptable", "acceptable"),
        columns=("source", "label", "mark", "sentence"),
    ),
    "sst2": Layout("SST-2", "sentence", "", "label", _BINARY, ("negative", "positive")),
    "mrpc": Layout("MRPC", "#1 String", "#2 String", "Quality", _BINARY, ("not_equivalent", "equivalent")),
    "stsb": Layout("STS-B", "sentence1", "sentence2", "score", bounds=(0.0, 5.0)),
    "qqp": Layout("QQP", "question1", "question2", "is_duplicate", _BINARY, ("not_duplicate", "duplicate"), torn=1e-3),
    "mnli": Layout(
        "MNLI",
        *("sentence1", "sentence2", "gold_label"),
        values=("entailment", "neutral", "contradiction"),
        dev=("dev_matched", "dev_mismatched"),
    ),
    "qnli": Layout("QNLI", "question", "sentence", "label", _ENTAILMENT),
    "rte": Layout("RTE", "sentence1", "sentence2", "label", _ENTAILMENT),
    "wnli": Layout("WNLI", "sentence1", "sentence2", "label", _BINARY, _ENTAILMENT[::-1]),
}


def read_tsv(path: Place, layout: Layout) -> Examples:
    """Return the examples of one file of a task.

    Raises:
      InputError: the file is missing, empty or not UTF-8, a column is missing, a row has too few columns, or a label is
        outside the task; the message has the file and, where known, the line.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    header = layout.columns or tuple(lines[0].split("\t"))
    first = 1 if layout.columns else 2
    for name in filter(None, (layout.text, layout.pair, layout.label)):
        if name not in header:
            raise InputError(
                f"{path}:1: no column {name!r}{did_you_mean(name, header)}; the header line has "
                f"{', '.join(map(repr, header))}"
            )
    rows = [(number, line.split("\t")) for number, line in enumerate(lines[first - 1 :], first) if line]
    complete = [(number, row) for number, row in rows if len(row) >= len(header)]
    if len(rows) - len(complete) > layout.torn * len(rows):
        number, row = next((number, row) for number, row in rows if len(row) < len(header))
        raise InputError(
            f"{path}:{number}: the row has {len(row)} columns, expected {len(header)} separated by tabs: {', '.join(header)}"
        )
    if len(complete) < len(rows):
        logging.getLogger(__name__).warning("%s: skipped %d incomplete rows", path, len(rows) - len(complete))
    if not complete:
        raise InputError(f"{path}: no rows below the header line; expected labelled examples")

    def column(name: str) -> list[str]:
        index = header.index(name)
        return [row[index] for _, row in complete]

    def where(index: int) -> str:
        return f"{path}:{complete[index][0]}"

    values = column(layout.label)
    labels = class_indices(values, layout.values, where) if layout.values else scores(values, where, layout.bounds)
    return Examples(column(layout.text), column(layout.pair) if layout.pair else None, labels)


def _folder(root: Place, layout: Layout) -> Place:
    """Return the folder of a task's files: ``root`` or its subfolder."""
    if not root.is_dir():
        raise InputError(
            f"data.dir: no folder {str(root)!r}; set data.dir to the folder with {layout.folder}/train.tsv"
        )
    inner = root / layout.folder
    if inner.is_dir():
        root = inner
    elif not (root / "train.tsv").is_file():
        raise InputError(f"data.dir: looked for {inner / 'train.tsv'} and {root / 'train.tsv'}; neither exists")
    return root


def load(task: str, folder: str) -> Task:
    """Return ``task`` (a key of `LAYOUTS`) from GLUE's folder or from the task's own folder; raises like `read_tsv`."""
    if task not in LAYOUTS:
        raise InputError(
            f"data.task: GLUE has no task {task!r}{did_you_mean(task, LAYOUTS)}; expected one of {', '.join(LAYOUTS)}"
        )
    layout = LAYOUTS[task]
    root = storage.as_path(folder)
    with multihost.raise_on_all(), storage.store_errors(root):
        root = _folder(root, layout)
    train = read_tsv(root / "train.tsv", layout)
    dev = {name: read_tsv(root / f"{name}.tsv", layout) for name in layout.dev}
    return Task(task, layout.labels or layout.values, train, dev, glue=task)
