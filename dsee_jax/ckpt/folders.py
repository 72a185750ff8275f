"""Folders of models: what they hold besides weights, in Hugging Face's layout; and folders that are whole or not there."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsee_jax.errors import InputError
from dsee_jax.runtime import storage

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)

GENERATION = "generation_config.json"
"""How a decoder is to generate: the tokens that end a text, and the like."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises `InputError` when it is missing or holds anything else."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: is {path.parent} the folder of a model?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; expected an object of fields")
    return found


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside ``path`` to write into; it becomes ``path`` at the end, and goes if anything fails.

    Of a ``path`` in a store the folder is one of this machine, and is put there at the end.

    Args:
      path: the folder to make; its parents are made too.
      overwrite: replace what stands there.

    Raises:
      InputError: ``path`` exists and is not an empty folder (without ``overwrite``).
    """
    there = storage.as_path(path)
    with storage.store_errors(there):
        if there.exists() and not overwrite and not (there.is_dir() and not any(there.iterdir())):
            raise InputError(f"{path} exists: give a new folder, or pass overwrite=True")
    if not isinstance(there, Path):
        with storage.written(there) as made:
            made.mkdir()
            yield made
        return
    path = there.absolute()
    staging, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run has left
    staging.mkdir(parents=True)
    try:
        yield staging
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


LOG = "metrics.jsonl"

CONFIG = "config.yaml"
"""The resolved config in the folder of a run."""

ADAPTER, MODEL = "adapter", "model"

METRICS = "metrics.json"
