"""Stores: every path may be a URL such as ``gs://BUCKET/...``, of any scheme that fsspec knows (`StorePath`).

Models and runs are downloaded to ``$DSEE_JAX_CACHE`` (``~/.cache/dsee_jax``) before they are read, and again only if they
changed; small files are read in the store. Outputs are written on this machine and uploaded when they are complete, several
files at once. The folder of a run is written in the store: checkpoints by Orbax, which supports gs:// only, and each small
file as one object. Each host of a job downloads the files that it reads.
"""

import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeAlias

import filelock

from dsee_jax.errors import InputError
from dsee_jax.runtime import atomic, store_path, writable
from dsee_jax.runtime.store_path import StorePath

Place: TypeAlias = pathlib.Path | StorePath
"""A path of this machine or of a store."""

WEB = ("http", "https")
"""The schemes of web servers, which list no files and take none."""

READ_ONLY = dict.fromkeys(WEB, "is for reading") | {"hf": "is for reading here; write a folder, and give --push REPO"}
"""The schemes that no output may have, and the reason."""

UPLOADS = 8
"""The most files that are uploaded at once."""

CACHE = "DSEE_JAX_CACHE"
LAST = ("config.json", "adapter_config.json")
"""The files that identify a model or an adapter; uploaded last, so that an incomplete upload is recognised."""

NOT_DOWNLOADED = ("checkpoints", "teacher", "pruned")
"""The folders of a run that `download` leaves out: they are large, and only a resumed run reads them."""


class StoreError(OSError):
    """A store did not take an output; the message is one line."""


def as_path(path: str | os.PathLike[str]) -> Place:
    """Return a path of a store as `StorePath`, of this machine as `pathlib.Path` (``~`` is the home folder).

    Raises:
      InputError: fsspec knows no such store, or its package is not installed.
    """
    text = os.fspath(path)
    if remote(text):
        return StorePath(text)
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # no such user
        raise InputError(f"{text}: {error}") from None


def as_output(path: str | os.PathLike[str]) -> Place:
    """Return the path of an output, as `as_path`; raises `InputError` for a store of `READ_ONLY` too."""
    place = as_path(path)
    if isinstance(place, StorePath) and not may_be_written(place):
        raise InputError(f"{place} cannot be written: {place.scheme}:// {READ_ONLY[place.scheme]}")
    return place


def may_be_written(place: Place) -> bool:
    """Return whether a path may be an output: a local one, or one in a store that is not of `READ_ONLY`."""
    return not isinstance(place, StorePath) or place.scheme not in READ_ONLY


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
    url, local = str(place), cache() / place.scheme / place.inside
    with store_errors(url), locked(url):
        objects = _objects(place, names)
        if not objects:
            raise InputError(f"{url}: there is nothing there; list the store with its own tools")
        for name, about in sorted(objects.items()):
            every = not names and name.partition("/")[0] not in NOT_DOWNLOADED
            if (
                not name
                or every
                or any(fnmatch.fnmatch(name, pattern) and ("/" in pattern or "/" not in name) for pattern in names)
            ):
                _fetch(place, name, about, local / name if name else local)
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
    return f"{scheme}://{'/'.join(parts)}" if store_path.is_scheme(scheme) else None


def listdir(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the files in a folder of a store, without its subfolders; [] if there is no such folder."""
    place = StorePath(os.fspath(path))
    with store_errors(place):
        if place.scheme in WEB:
            raise InputError(f"{place}: a web server lists no files; give the path of one file, or copy the folder")
        entries = place.system.ls(place.key, detail=True) if place.is_dir() else []
    return sorted(name for about in entries if about["type"] == "file" and (name := about["name"].rpartition("/")[2]))


def _objects(place: StorePath, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return what the store says about each file below a path, by its path there; "" is the path itself."""
    try:
        if place.scheme in WEB:
            return {} if names else {"": place.fresh().info(place.key)}
        entries = place.fresh().find(place.key, detail=True)
    except FileNotFoundError:
        return {}
    objects = {}
    for entry, about in entries.items():
        name = entry.removeprefix(place.key).lstrip("/")
        # Markers of folders are no files; dots would lead out of the cache.
        if about["type"] == "file" and not entry.endswith("/") and not {".", ".."} & set(name.split("/")):
            objects[name] = about
    if "" in objects and len(objects) > 1:
        del objects[""]
    return objects


@contextlib.contextmanager
def written(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[pathlib.Path]:
    """Yield the local path to write a file or a folder to: ``path`` itself, or for a store a path that is uploaded at the end.

    Raises:
      InputError: without ``overwrite``, the store has ``path``; on this machine the caller checks.
      StoreError: see `upload`.
    """
    place = as_output(path)
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

    Up to `UPLOADS` files are copied at once. An existing folder is deleted only when all files of the new folder are in the
    store. `LAST` are uploaded last.

    Raises:
      StoreError: the store cannot be reached, or does not take a file, which the line names. No other file is begun then.
    """
    to = StorePath(os.fspath(place))
    if local.is_file():
        _put(local, to)
        return
    if "/" not in to.inside:
        raise StoreError(f"{to} is a whole bucket: name a folder in it")
    names = sorted(file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file())
    with store_errors(to, StoreError):
        old = to.is_dir()
    new = StorePath(f"{to}.partial") if old else to
    _each(names, new, lambda name: _put(local / name, _below(new, name)))
    if old:
        with store_errors(to, StoreError):
            to.system.rm(to.key, recursive=True)
        _each(names, to, lambda name: _copy(_below(new, name), _below(to, name)))
        with store_errors(new, StoreError):
            new.system.rm(new.key, recursive=True)
    to.fresh()


def _each(names: Iterable[str], to: StorePath, work: Callable[[str], None]) -> None:
    """Do the work for each file of a folder: first the weights, then the JSON files, and then `LAST`.

    Args:
      names: of the files.
      to: the folder in the store. A store with one connection, such as FTP, takes one file at a time.
      work: copies one file. The first error cancels those that have not begun, and is raised when the others have ended.
    """

    def order(name: str) -> tuple[bool, bool]:
        return name.endswith(".json"), name.rpartition("/")[2] in LAST

    for _, together in itertools.groupby(sorted(names, key=order), order):
        with ThreadPoolExecutor(UPLOADS if to.system.async_impl else 1) as pool:
            try:
                for done in as_completed([pool.submit(work, name) for name in together]):
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _below(folder: StorePath, name: str) -> StorePath:
    return StorePath(f"{folder}/{name}")


def _put(local: pathlib.Path, to: StorePath) -> None:
    with store_errors(to, StoreError):
        to.make_parent()
        to.system.put_file(str(local), to.key)


def _copy(at: StorePath, to: StorePath) -> None:
    with store_errors(to, StoreError):
        to.make_parent()
        to.system.copy(at.key, to.key)


def target(path: str, option: str) -> Place:
    """Return the output file of a command's ``option``; raises `InputError` if the file cannot be written there."""
    file = as_output(path)
    if isinstance(file, pathlib.Path):
        if file.is_dir():
            raise InputError(f"{option} {file} is a folder; name a file")
        writable.check(file, option)
    return file


def size(path: Place) -> int:
    """Return the size of a file in bytes."""
    return path.stat().st_size if isinstance(path, pathlib.Path) else path.size()


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


def _fetch(place: StorePath, name: str, about: dict[str, Any], local: pathlib.Path) -> None:
    """Download one object, unless the local copy is of its present content."""
    stamp = cache() / "stamps" / digest(str(local))
    now = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    if local.is_file() and stamp.is_file() and stamp.read_text() == f"{now} {local.stat().st_size}":
        return
    local.parent.mkdir(parents=True, exist_ok=True)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(local) as partial:
        place.system.get_file(_below(place, name).key if name else place.key, str(partial))
        if about["size"] is not None and (size := partial.stat().st_size) != about["size"]:
            raise OSError(f"{size} bytes of {about['size']} came")
    stamp.write_text(f"{now} {local.stat().st_size}")


def _some(objects: dict[str, Any]) -> str:
    names = sorted(objects)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
