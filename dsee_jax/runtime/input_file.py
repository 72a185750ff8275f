"""Small files that a user names: read whole, without waiting for a pipe or reading a device for ever."""

import os
import pathlib
import stat

from dsee_jax.errors import InputError
from dsee_jax.runtime import storage
from dsee_jax.runtime.storage import Place

LARGEST = 1_000_000
"""The largest file of settings that is read, in bytes."""


def check(path: Place) -> None:
    """Raise `InputError` if reading ``path``, of this machine, would fail, wait for ever or never end.

    The pipe of a shell (``<(command)``, ``/dev/stdin``) is a file like any other, and so is the null device.
    """
    if not isinstance(path, pathlib.Path) or str(path) == os.devnull:
        return
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', error)}; expected a readable file") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; expected a file")
    if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and path.is_relative_to("/dev")):
        raise InputError(f"{path} is a device or a pipe; expected a file")


def read_text(path: Place, expected: str) -> str:
    """Return the UTF-8 text of a file of settings, without a byte-order mark.

    Args:
      path: the file.
      expected: the content, for errors, such as ``a config in YAML``.

    Raises:
      InputError: the file cannot be read, is larger than `LARGEST`, or is no UTF-8 text.
    """
    check(path)
    try:
        with storage.store_errors(path), path.open("rb") as file:
            content = bytes(file.read(LARGEST + 1))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected {expected}") from None
    if len(content) > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST:,} bytes; expected {expected}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); expected {expected}") from None
