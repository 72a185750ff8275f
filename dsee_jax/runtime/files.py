"""``metrics.jsonl``: one JSON object a line; and JSON files that are never half-written. Process 0 of a job writes, alone."""

import json
import logging
import os
import pathlib
import time
from typing import Any

from dsee_jax.runtime import multihost, storage
from dsee_jax.runtime.storage import Place

log = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two times that a journal in a store is written: an object cannot be added to, and is written again whole."""


class _Kept:
    """A journal in a store, as it is to be; and when it was last written so, and whether it is."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.written = text, time.monotonic(), True


_stored: dict[str, _Kept] = {}


def append(path: Place, record: dict[str, Any]) -> None:
    """Add one line; to a journal in a store, within `EVERY` seconds, or with `flush`."""
    if not multihost.is_main():
        return
    line = json.dumps(record) + "\n"
    if isinstance(path, pathlib.Path):
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
        return
    if str(path) not in _stored:
        _stored[str(path)] = _Kept(_text(path))
    kept = _stored[str(path)]
    kept.text, kept.written = kept.text + line, False
    if time.monotonic() - kept.at >= EVERY:
        try:
            flush(path)
        except storage.StoreError as error:
            # Nothing is lost yet: it is tried again, and has to be there before a checkpoint is.
            kept.at = time.monotonic()
            log.warning("%s", error)


def flush(path: Place) -> None:
    """Write what was added to a journal in a store and is not there yet; raises `StoreError` where that cannot be done."""
    kept = _stored.get(str(path))
    if kept and not kept.written:
        with storage.store_errors(path, storage.StoreError):
            path.write_text(kept.text)
        kept.at, kept.written = time.monotonic(), True


def read(path: Place) -> list[dict[str, Any]]:
    """Return the records; a last line cut short by a crash is left out, a missing file is empty."""
    flush(path)
    *lines, rest = _text(path).split("\n")
    del rest  # what follows the last newline was never finished
    return [json.loads(line) for line in lines]


def _text(path: Place) -> str:
    with storage.store_errors(path):
        return path.read_text(encoding="utf-8") if path.exists() else ""


def rewind(path: Place, done: list[str], stage: str, step: int) -> None:
    """Drop what was logged after step ``step`` of ``stage``, which a resumed run logs again; stages in ``done`` are kept."""
    if not multihost.is_main():
        return
    kept = [r for r in read(path) if r["stage"] in done or (r["stage"] == stage and r["step"] <= step)]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def write(path: Place, value: Any) -> None:
    """Write one JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Place, text: str) -> None:
    """Write one text file, whole or not at all: to a file beside it, synced, then renamed; an object of a store at once."""
    if not multihost.is_main():
        return
    if not isinstance(path, pathlib.Path):
        _stored.pop(str(path), None)
        with storage.store_errors(path, storage.StoreError):
            path.write_text(text)
        return
    beside = path.with_name(path.name + ".partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
