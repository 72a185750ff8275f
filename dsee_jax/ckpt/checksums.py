"""The sizes and CRC-32 of the files of a folder, in ``checksums.json`` in the folder, by which later damage is found."""

import json
import zlib
from collections.abc import Container
from pathlib import Path

NAME = "checksums.json"


def write(folder: Path, without: Container[str] = ()) -> None:
    """Write the checksums of all files below ``folder``, but those with the names ``without``."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in without]
    sums = {path.relative_to(folder).as_posix(): [path.stat().st_size, crc32(path)] for path in files}
    (folder / NAME).write_text(json.dumps(sums, indent=0) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """Return the first difference of ``folder`` from its checksums; None where there is none, or there are no checksums.

    Raises:
      OSError: a file cannot be read, which says nothing about its content.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        sums = {str(name): (int(size), int(crc)) for name, (size, crc) in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{NAME} is damaged"
    for name, (size, crc) in sums.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
        if crc32(file) != crc:
            return f"{name} has other bytes than were written"
    return None


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
