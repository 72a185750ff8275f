"""Plain texts for a language model: a text file, or JSON lines with a ``text`` each."""

from dsee_jax.config import DataConfig
from dsee_jax.data import tables
from dsee_jax.data.examples import Task, Texts, read_text
from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.runtime import storage
from dsee_jax.runtime.storage import Place


def load(config: DataConfig) -> Task:
    """Return the task of the train and dev files in ``data.dir``, named ``data.task``; raises `InputError` as `read` does."""
    names = [f"{{}}.{kind}" for kind in ("txt", "jsonl")]
    train, dev = (
        [name.format(split) for split in splits for name in names] for splits in (["train"], ["dev", "valid"])
    )
    paths = tables.files(config, train, dev)
    return Task(config.task, (), read(paths["train"]), {"dev": read(paths["dev"])})


def read(path: str | Place) -> Texts:
    """Return the texts of a file: one per line of a file named ``.jsonl``, in its key ``text``; of any other the whole file.

    Raises:
      InputError: the file is missing, empty or not UTF-8, or a line is no JSON object with a text.
    """
    place = storage.as_path(path) if isinstance(path, str) else path
    if not place.name.endswith(".jsonl"):
        return Texts([read_text(place)], [f"{place}:1"])
    texts = Texts([], [])
    for line, row in tables.rows(place, "jsonl"):
        if "text" not in row:
            near = did_you_mean("text", row)
            raise InputError(f"{place}:{line}: no 'text'{near}; expected one, found {', '.join(map(repr, row))}")
        if not isinstance(row["text"], str):
            raise InputError(f"{place}:{line}: 'text' is {shorten(repr(row['text']))}; expected a string")
        texts.text.append(row["text"])
        texts.where.append(f"{place}:{line}")
    return texts
