"""Object stores: every path may be ``gs://BUCKET/...`` or ``s3://BUCKET/...``.

Models and runs are downloaded to ``$DSEE_JAX_CACHE`` (``~/.cache/dsee_jax``) before they are read, and again only if they
changed; small files are read in the store. Outputs are written on this machine and uploaded when they are complete. The folder
of a run is written in the store: checkpoints by Orbax, which supports gs:// only, and each small file as one object. Each host
of a job downloads the files that it reads.
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
from collections.abc import Iterator
from typing import Any, TypeAlias

import filelock
from etils import epath

from dsee_jax.errors import InputError
from dsee_jax.runtime import atomic, writable

# Otherwise etils reads stores through TensorFlow where it is installed, with TensorFlow's credentials.
os.environ.setdefault("EPATH_USE_TF", "false")

Place: TypeAlias = pathlib.Path | epath.Path
"""A path of this machine or of a store."""

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
"""The supported stores by URL scheme, and the package of each; the extras have the names of the schemes."""

CACHE = "DSEE_JAX_CACHE"
LAST = ("config.json", "adapter_config.json")
"""The files that identify a model or an adapter; uploaded last, so that an incomplete upload is recognised."""

NOT_DOWNLOADED = "checkpoints"
"""The folder of a run that `download` leaves out: it is large, and only a resumed run reads it."""


class StoreError(OSError):
    """A store did not take an output; the message is one line."""


def as_path(path: str | os.PathLike[str]) -> Place:
    """Return a path of a store as `epath.Path`, of this machine as `pathlib.Path` (``~`` is the home folder).

    Raises:
      InputError: the store is not one of `SCHEMES`, or its package is not installed.
    """
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        try:
            return pathlib.Path(text).expanduser()
        except RuntimeError as error:  # no such user
            raise InputError(f"{text}: {error}") from None
    if scheme not in SCHEMES or not rest.strip("/"):
        supported = ", ".join(f"{name}://BUCKET/..." for name in SCHEMES)
        raise InputError(f"{text} is not a path of a supported store; expected a path of this machine, or {supported}")
    _system(scheme)
    return epath.Path(text)


def remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in a store."""
    return "://" in os.fspath(path)


def download(path: str | os.PathLike[str], *names: str) -> pathlib.Path:
    """Return the local path of a file or folder; from a store, changed files are downloaded first.

    Processes of one machine that download the same path wait for each other.

    Args:
      path: a path of this machine, which is returned unchanged, or of a store.
      names: patterns (`fnmatch`) of the files to download from a folder; only patterns with a ``/`` fit files in subfolders.
        Without patterns: all files below the folder, except `NOT_DOWNLOADED`.

    Raises:
      InputError: the store has no such path, or cannot be reached.
    """
    place = as_path(path)
    if isinstance(place, pathlib.Path):
        return place
    url = str(place).rstrip("/")
    scheme, _, key = url.partition("://")
    local = cache() / scheme / key
    with store_errors(url), locked(url):
        system = _fresh(scheme)
        objects = {}
        for entry, about in system.find(key, detail=True).items():
            name = entry.removeprefix(key).lstrip("/")
            # Markers of folders are no files; dots would lead out of the cache.
            if about["type"] == "file" and not entry.endswith("/") and not {".", ".."} & set(name.split("/")):
                objects[name] = about
        if "" in objects and len(objects) > 1:
            del objects[""]
        if not objects:
            raise InputError(f"{url}: there is nothing there; list the bucket with the store's own tools")
        for name, about in sorted(objects.items()):
            every = not names and not name.startswith(f"{NOT_DOWNLOADED}/")
            if (
                not name
                or every
                or any(fnmatch.fnmatch(name, pattern) and ("/" in pattern or "/" not in name) for pattern in names)
            ):
                _fetch(system, f"{key}/{name}" if name else key, about, local / name if name else local)
        if "" not in objects and not local.is_dir():
            raise InputError(f"{url} has none of {', '.join(names) or 'the files of a run'}; it has {_some(objects)}")
        if local.is_dir():
            # A copy of a file that the store deleted would become a part of the model.
            for copy in local.rglob("*"):
                if copy.is_file() and copy.relative_to(local).as_posix() not in objects:
                    copy.unlink()
    return local


def origin(local: pathlib.Path) -> str | None:
    """Return the path in a store of a file that `download` copied; None for any other file."""
    try:
        scheme, *parts = local.absolute().relative_to(cache().absolute()).parts
    except ValueError:
        return None
    return f"{scheme}://{'/'.join(parts)}" if scheme in SCHEMES else None


def listdir(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the files in a folder of a store, without its subfolders; [] if there is no such folder."""
    place = as_path(path)
    scheme, _, key = str(place).rstrip("/").partition("://")
    with store_errors(place):
        system = _fresh(scheme)
        entries = system.ls(key, detail=True) if system.isdir(key) else []
    return sorted(name for about in entries if about["type"] == "file" and (name := about["name"].rpartition("/")[2]))


@contextlib.contextmanager
def written(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[pathlib.Path]:
    """Yield the local path to write a file or a folder to: ``path`` itself, or for a store a path that is uploaded at the end.

    Raises:
      InputError: without ``overwrite``, the store has ``path``; on this machine the caller checks.
      StoreError: see `upload`.
    """
    place = as_path(path)
    if isinstance(place, pathlib.Path):
        yield place
        return
    with store_errors(place):
        if not overwrite and place.exists():
            raise InputError(f"{place} exists: give another path, or remove it")
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="made_", dir=cache()) as folder:
        local = pathlib.Path(folder) / place.name
        yield local
        upload(local, place)


def upload(local: pathlib.Path, place: str | os.PathLike[str]) -> None:
    """Copy a file, or a folder with its subfolders, to a store; an existing file or folder is replaced.

    An existing folder is deleted only when all files of the new folder are in the store. `LAST` are uploaded last.

    Raises:
      StoreError: the store cannot be reached, or does not take the files.
    """
    url = os.fspath(place).rstrip("/")
    scheme, _, key = url.partition("://")
    if "/" not in key and local.is_dir():
        raise StoreError(f"{url} is a whole bucket: name a folder in it")
    with store_errors(url, StoreError):
        system = _fresh(scheme)
        if local.is_file():
            system.put_file(str(local), key)
            system.invalidate_cache()
            return
        files = [file.relative_to(local).as_posix() for file in sorted(local.rglob("*")) if file.is_file()]
        files.sort(key=lambda name: (name.endswith(".json"), name.rpartition("/")[2] in LAST))
        old = system.isdir(key)
        to = f"{key}.partial" if old else key
        for name in files:
            system.put_file(str(local / name), f"{to}/{name}")
        if old:
            system.rm(key, recursive=True)
            for name in files:
                system.copy(f"{to}/{name}", f"{key}/{name}")
            system.rm([f"{to}/{name}" for name in files])
        system.invalidate_cache()


def target(path: str, option: str) -> Place:
    """Return the output file of a command's ``option``; raises `InputError` if the file cannot be written there."""
    file = as_path(path)
    if isinstance(file, pathlib.Path):
        if file.is_dir():
            raise InputError(f"{option} {file} is a folder; name a file")
        writable.check(file, option)
    return file


def size(path: Place) -> int:
    """Return the size of a file in bytes."""
    return path.stat().st_size if isinstance(path, pathlib.Path) else int(path.stat().length or 0)


@contextlib.contextmanager
def store_errors(path: str | os.PathLike[str], kind: type[Exception] = InputError) -> Iterator[None]:
    """Turn any error of a store into one line of type ``kind`` that names ``path``; errors of local paths pass."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # The packages of the stores raise errors without a common type: no bucket, no credentials, no network.
        if not remote(path):
            raise
        reason = " ".join(str(error).split())[:300]
        raise kind(
            f"{os.fspath(path)} cannot be reached ({type(error).__name__}: {reason}): check the bucket, your credentials and "
            "the network"
        ) from None


def cache() -> pathlib.Path:
    """Return the folder of downloads, and of outputs before their upload."""
    return pathlib.Path(os.environ.get(CACHE) or "~/.cache/dsee_jax").expanduser()


def scratch(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the local folder of an unfinished output for ``path``; an interrupted command finds the same folder again."""
    folder = cache() / "unfinished" / digest(os.fspath(path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear(folder: pathlib.Path) -> None:
    """Delete a folder of `scratch`."""
    shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _system(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        raise InputError(f"{scheme}:// needs {SCHEMES[scheme]}: pip install 'dsee-jax[{scheme}]'") from None


def _fresh(scheme: str) -> Any:
    """Return the file system of a store without cached listings: other processes write there too."""
    system = _system(scheme)
    system.invalidate_cache()
    return system


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Wait until no other process of this machine writes the copy of ``path`` in the cache, and keep others waiting."""
    folder = cache() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / digest(path)):
        yield


def digest(text: str) -> str:
    """Return the name of the cache's files for a path."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fetch(system: Any, key: str, about: dict[str, Any], local: pathlib.Path) -> None:
    """Download one object, unless the local copy is of its present content."""
    stamp = cache() / "stamps" / digest(str(local))
    now = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    if local.is_file() and stamp.is_file() and stamp.read_text() == f"{now} {local.stat().st_size}":
        return
    local.parent.mkdir(parents=True, exist_ok=True)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(local) as partial:
        system.get_file(key, str(partial))
        if (size := partial.stat().st_size) != about["size"]:
            raise OSError(f"{size} bytes of {about['size']} came")
    stamp.write_text(f"{now} {local.stat().st_size}")


def _some(objects: dict[str, Any]) -> str:
    names = sorted(objects)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
