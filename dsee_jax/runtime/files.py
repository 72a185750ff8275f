"""Strict JSON, the log of a run (one object per line), and files and folders that are complete or absent, on disks and in
stores.

In a job, only process 0 writes files.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dsee_jax.errors import InputError
from dsee_jax.runtime import atomic, earlier_output, multihost, storage
from dsee_jax.runtime.storage import Place

log = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two writes of a log in a store: a store cannot append to an object, so each write replaces the log."""


class _Stored:
    """The text of a log in a store, the time of the last write, and whether the store has all of the text."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.written = text, time.monotonic(), True


_stored: dict[str, _Stored] = {}


def dumps(value: Any, **options: Any) -> str:
    """Return strict JSON; a float that is not finite becomes null. ``options`` are those of ``json.dumps``."""
    return json.dumps(_strict(value), allow_nan=False, **options)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(path: Place, record: dict[str, Any]) -> None:
    """Add one line to a log; a store receives the line within `EVERY` seconds, or at the next `flush`."""
    if not multihost.is_main():
        return
    line = dumps(record) + "\n"
    if isinstance(path, pathlib.Path):
        with atomic.named(path), path.open("a", encoding="utf-8") as file:
            file.write(line)
        return
    if str(path) not in _stored:
        _stored[str(path)] = _Stored(_text(path))
    stored = _stored[str(path)]
    stored.text, stored.written = stored.text + line, False
    if time.monotonic() - stored.at >= EVERY:
        try:
            flush(path)
        except storage.StoreError as error:
            # The line is still in memory; the next call tries again, and the flush before a checkpoint must succeed.
            stored.at = time.monotonic()
            log.warning("%s", error)


def flush(path: Place) -> None:
    """Write the lines that a log in a store lacks; raises `StoreError` if the store does not take them."""
    stored = _stored.get(str(path))
    if stored and not stored.written:
        with storage.store_errors(path, storage.StoreError):
            path.write_text(stored.text)
        stored.at, stored.written = time.monotonic(), True


def read(path: Place) -> list[dict[str, Any]]:
    """Return the records of a log; a last line without its newline (a crash) is left out, a missing file is empty.

    A line that is no record is left out with a warning.
    """
    flush(path)
    *lines, _ = _text(path).split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            log.warning("%s:%d is damaged, expected a JSON object: left out", path, number)
    return records


def _text(path: Place) -> str:
    with storage.store_errors(path):
        return path.read_bytes().decode("utf-8", "replace") if path.exists() else ""


def rewind(path: Place, done: list[str], stage: str, step: int) -> None:
    """Drop the records after step ``step`` of ``stage``, which a resumed run logs again; keep the stages in ``done``."""
    if not multihost.is_main():
        return
    steps = range(step + 1)
    records = [r for r in read(path) if r.get("stage") in done or (r.get("stage") == stage and r.get("step") in steps)]
    write_text(path, "".join(dumps(record) + "\n" for record in records))


def write(path: Place, value: Any) -> None:
    """Write one JSON file, completely or not at all."""
    write_text(path, dumps(value, indent=1) + "\n")


def write_text(path: Place, text: str) -> None:
    """Write one text file, completely or not at all (`dsee_jax.runtime.atomic`; a store replaces an object at once)."""
    if not multihost.is_main():
        return
    if isinstance(path, pathlib.Path):
        with atomic.file(path) as partial:
            partial.write_text(text, encoding="utf-8")
        return
    _stored.pop(str(path), None)
    with storage.store_errors(path, storage.StoreError):
        path.write_text(text)


@contextlib.contextmanager
def folder(path: str | os.PathLike[str], *, replaces: Collection[str] = ()) -> Iterator[pathlib.Path]:
    """Yield an empty local folder to write into; it becomes ``path`` at the end, and is deleted on an error.

    If ``path`` is in a store, the folder is uploaded at the end.

    Args:
      path: the folder to create, and its parents.
      replaces: names (`dsee_jax.runtime.earlier_output`) of the files that an existing ``path`` may hold; it is then replaced.

    Raises:
      InputError: ``path`` exists and is not an empty folder, or holds a file that is not in ``replaces``.
      StoreError: the store does not take the folder.
    """
    place = storage.as_output(path)
    with storage.store_errors(place):
        if replaces:
            earlier_output.check(place, replaces)
        elif not earlier_output.is_absent(place):
            raise InputError(f"{path} exists: give a new folder")
    if isinstance(place, pathlib.Path):
        with atomic.folder(place) as partial:
            yield partial
        return
    with storage.written(place) as local:
        local.mkdir()
        yield local
