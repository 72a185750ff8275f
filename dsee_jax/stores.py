"""Object stores: ``gs://BUCKET/...`` and ``s3://BUCKET/...`` stand wherever a path does.

What is read is first copied to this machine, below ``$DSEE_JAX_CACHE`` (``~/.cache/dsee_jax``), as models of the hub are, and
only again where it has changed. What is written is made on this machine and put there whole. The folder of a run is
written in place: checkpoints by Orbax, which writes to gs:// alone, and small files as one object each.
Of several hosts each copies what it reads.
"""

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from etils import epath

from dsee_jax.errors import InputError

Place: TypeAlias = pathlib.Path | epath.Path
"""Where something is: a path of this machine, or of a store."""

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
"""The stores there are, by how their paths begin, and the package that reaches each; their extras have the same names."""

CACHE = "DSEE_JAX_CACHE"


def place(path: str | os.PathLike[str]) -> Place:
    """Return a path as what it is: `epath.Path` of a store, `pathlib.Path` of this machine (``~`` is the home folder).

    Raises:
      InputError: a store that is none of `SCHEMES`, or whose package is not installed.
    """
    text = os.fspath(path)
    scheme, found, rest = text.partition("://")
    if not found:
        try:
            return pathlib.Path(text).expanduser()
        except RuntimeError as error:  # no such user
            raise InputError(f"{text}: {error}") from None
    if scheme not in SCHEMES or not rest.strip("/"):
        known = ", ".join(f"{name}://BUCKET/..." for name in SCHEMES)
        raise InputError(
            f"{text} is no path of a store that is known here; expected a path of this machine, or {known}"
        )
    _system(scheme)
    return epath.Path(text)


def remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is of a store."""
    return "://" in os.fspath(path)


def local(path: str | os.PathLike[str], *names: str) -> pathlib.Path:
    """Return where a file or folder lies on this machine; of a store it is copied first, as far as it has changed.

    Args:
      path: of this machine, which is returned as it is, or of a store.
      names: of a folder's files: patterns (`fnmatch`) of the names wanted from the folder itself. None: all files below it but
        the checkpoints of a run.

    Raises:
      InputError: there is no such thing in the store, or it cannot be reached.
    """
    there = place(path)
    if isinstance(there, pathlib.Path):
        return there
    url = str(there).rstrip("/")
    scheme, _, key = url.partition("://")
    here = pathlib.Path(os.environ.get(CACHE) or "~/.cache/dsee_jax").expanduser() / scheme / key
    with reached(url):
        system = _fresh(scheme)
        found = {entry.removeprefix(key).lstrip("/"): about for entry, about in system.find(key, detail=True).items()}
        if not found:
            raise InputError(f"{url}: there is nothing there; look at it with the store's own tools")
        for name, about in sorted(found.items()):
            whole = not names and not name.startswith("checkpoints/")
            if not name or whole or any("/" not in name and fnmatch.fnmatch(name, wanted) for wanted in names):
                _copied(system, f"{key}/{name}" if name else key, about, here / name if name else here)
    if "" not in found and not here.is_dir():
        raise InputError(f"{url} holds none of {', '.join(names) or 'the files of a run'}; it has {_some(found)}")
    _forget(here, found, names)
    return here


def listed(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the files of a folder itself, or [] where there is none."""
    there = place(path)
    if isinstance(there, pathlib.Path):
        return sorted(one.name for one in there.iterdir() if one.is_file()) if there.is_dir() else []
    scheme, _, key = str(there).partition("://")
    with reached(there):
        system = _fresh(scheme)
        found = system.ls(key, detail=True) if system.isdir(key) else []
    return sorted(about["name"].rpartition("/")[2] for about in found if about["type"] == "file")


@contextlib.contextmanager
def written(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[pathlib.Path]:
    """Yield where to write a file or a folder that is to stand at ``path``: there, or where it is put from at the end.

    Of a folder that stands in a store nothing is left of what was there before, and ``config.json`` and other files that say
    what a folder is are put last: what is cut short is seen to be.

    Raises:
      InputError: without ``overwrite``, something stands there, in a store; on this machine that is for who writes to see to.
    """
    there = place(path)
    if isinstance(there, pathlib.Path):
        yield there
        return
    with reached(there):
        if not overwrite and there.exists():
            raise InputError(f"{there} exists: give another path, or remove it")
    with tempfile.TemporaryDirectory(prefix="dsee_jax") as scratch:
        made = pathlib.Path(scratch) / there.name
        yield made
        put(made, there)


def put(made: pathlib.Path, there: str | os.PathLike[str]) -> None:
    """Copy a file, or a folder with all below it, to a store, in the place of what is there."""
    url = os.fspath(there).rstrip("/")
    scheme, _, key = url.partition("://")
    with reached(url):
        system = _fresh(scheme)
        if made.is_file():
            system.put_file(str(made), key)
            return
        if system.isdir(key):
            system.rm(key, recursive=True)
        files = [file for file in sorted(made.rglob("*")) if file.is_file()]
        for file in sorted(files, key=lambda file: file.suffix == ".json"):
            system.put_file(str(file), f"{key}/{file.relative_to(made).as_posix()}")
        system.invalidate_cache()


def size(path: Place) -> int:
    """Return the bytes of a file."""
    return path.stat().st_size if isinstance(path, pathlib.Path) else int(path.stat().length or 0)


@contextlib.contextmanager
def reached(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a store answers into an `InputError` that names the path; of this machine's paths errors stay."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Each package of a store has its own errors, of no common kind: no bucket, no credentials, no network.
        if not remote(path):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{os.fspath(path)} cannot be reached ({type(error).__name__}: {reason}): check the bucket, your credentials and "
            "the network"
        ) from None


@functools.cache
def _system(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        raise InputError(f"{scheme}:// needs {SCHEMES[scheme]}: pip install 'dsee-jax[{scheme}]'") from None


def _fresh(scheme: str) -> Any:
    """Return what reaches a store, with nothing remembered of what it held: others write there too."""
    system = _system(scheme)
    system.invalidate_cache()
    return system


def _copied(system: Any, key: str, about: dict[str, Any], here: pathlib.Path) -> None:
    """Copy one object, unless the copy that is there was made of it as it is now."""
    stamp = _stamp(here)
    now = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    if here.is_file() and stamp.is_file() and stamp.read_text() == f"{now} {here.stat().st_size}":
        return
    here.parent.mkdir(parents=True, exist_ok=True)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    beside = here.with_name(f".{here.name}.{os.getpid()}.partial")
    try:
        system.get_file(key, str(beside))
        if (held := beside.stat().st_size) != about["size"]:
            raise OSError(f"{held} bytes of {about['size']} came")
        beside.replace(here)
    finally:
        beside.unlink(missing_ok=True)
    stamp.write_text(f"{now} {here.stat().st_size}")


def _stamp(here: pathlib.Path) -> pathlib.Path:
    """Return the file that says of which object a copy is; in a folder beside it, out of the way of those who list."""
    return here.parent / ".stamps" / here.name


def _forget(here: pathlib.Path, found: dict[str, Any], names: Sequence[str]) -> None:
    """Drop the copies of what the store no longer has."""
    if not here.is_dir():
        return
    for stamp in here.glob(".stamps/*" if names else "**/.stamps/*"):
        copy = stamp.parent.parent / stamp.name
        if copy.relative_to(here).as_posix() not in found:
            copy.unlink(missing_ok=True)
            stamp.unlink()


def _some(found: dict[str, Any]) -> str:
    names = sorted(found)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def scratch(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return a folder of this machine for what is long in the making and goes to ``path``, the same each time; its own."""
    name = hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get(CACHE) or "~/.cache/dsee_jax").expanduser() / "unfinished" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear(folder: pathlib.Path) -> None:
    """Remove a folder of `scratch`."""
    shutil.rmtree(folder, ignore_errors=True)
