"""``metrics.jsonl``: one JSON object a line; and JSON files that are never half-written. Process 0 of a job writes, alone."""

import json
import os
from pathlib import Path
from typing import Any

from dsee_jax import processes


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line."""
    if not processes.first():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records; a last line cut short by a crash is left out, a missing file is empty."""
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    del rest  # what follows the last newline was never finished
    return [json.loads(line) for line in lines]


def rewind(path: Path, done: list[str], stage: str, step: int) -> None:
    """Drop what was logged after step ``step`` of ``stage``, which a resumed run logs again; stages in ``done`` are kept."""
    if not processes.first():
        return
    kept = [r for r in read(path) if r["stage"] in done or (r["stage"] == stage and r["step"] <= step)]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def write(path: Path, value: Any) -> None:
    """Write one JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write one text file, whole or not at all: to a file beside it, synced, then renamed."""
    if not processes.first():
        return
    beside = path.with_name(path.name + ".partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
