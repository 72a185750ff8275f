"""The earlier output at the path of a new one: a command replaces a folder only if commands like it wrote everything in it."""

import fnmatch
import pathlib
from collections.abc import Collection, Iterator

from dsee_jax.errors import InputError
from dsee_jax.runtime import storage
from dsee_jax.runtime.storage import Place

_OF_THE_SYSTEM = (".DS_Store",)
"""Files that the system leaves in a folder which a person looks at."""


def is_absent(folder: Place) -> bool:
    """Return whether nothing, or an empty folder, is at a path."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check(folder: Place, names: Collection[str], *, marker: tuple[str, str] | None = None) -> None:
    """Raise `InputError` unless ``folder`` is absent, empty, or an earlier output that may be replaced.

    Args:
      folder: of this machine or of a store.
      names: patterns (`fnmatch`) of the files that the command writes, by their paths in the folder.
      marker: the name and the first characters of a file that the command writes into every output; without this file the
        folder is not the command's, even if all names fit.

    Raises:
      InputError: the folder holds another file or subfolder, lacks the marker, or is a file.
    """
    with storage.store_errors(folder):
        if not folder.exists():
            return
        if not folder.is_dir():
            raise InputError(f"{folder} is a file; name a folder")
        for other in _others(folder, "", (*names, *_OF_THE_SYSTEM)):
            raise InputError(
                f"{folder} is not replaced: {other!r} in it is not a file that this command writes; move it away, or name "
                "another folder"
            )
        if marker and any(folder.iterdir()) and not _begins(folder / marker[0], marker[1]):
            raise InputError(
                f"{folder} is not replaced: it has no {marker[0]} of an earlier output; name another folder, or delete it"
            )


def _others(folder: Place, path: str, names: Collection[str]) -> Iterator[str]:
    """Yield the paths of the files below a folder, and of its subfolders, that fit none of ``names``."""
    for entry in sorted(folder.iterdir()):
        inside = f"{path}{entry.name}"
        if entry.is_dir() and not _is_link(entry) and any(name.startswith(f"{inside}/") for name in names):
            yield from _others(entry, f"{inside}/", names)
        elif not any(fnmatch.fnmatchcase(inside, name) for name in names) or entry.is_dir():
            yield inside


def _is_link(entry: Place) -> bool:
    return isinstance(entry, pathlib.Path) and entry.is_symlink()


def _begins(file: Place, text: str) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return bytes(opened.read(len(text.encode()))) == text.encode()
