"""Object stores: ``gs://BUCKET/...`` and ``s3://BUCKET/...`` stand wherever a path does.

Models and runs that are read are first copied to this machine, below ``$DSEE_JAX_CACHE`` (``~/.cache/dsee_jax``), as models of
the hub are, and only again where they have changed; small files are read where they are. What is written is made on this
machine and put there whole. The folder of a run is written in place: checkpoints by Orbax, which writes to gs:// alone, and
small files as one object each. Of several hosts each copies what it reads.
"""

import contextlib
import fcntl
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

from etils import epath

from dsee_jax.errors import InputError

# Else, where TensorFlow is installed, a path reaches its store by that, with credentials of its own.
os.environ.setdefault("EPATH_USE_TF", "false")

Place: TypeAlias = pathlib.Path | epath.Path
"""Where something is: a path of this machine, or of a store."""

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
"""The stores there are, by how their paths begin, and the package that reaches each; their extras have the same names."""

CACHE = "DSEE_JAX_CACHE"
LAST = ("config.json", "adapter_config.json")
"""What a folder is known by; put last, so that one that was cut short is seen to be."""


class StoreError(OSError):
    """What was to be written could not be put into a store; one line."""


def as_path(path: str | os.PathLike[str]) -> Place:
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


def download(path: str | os.PathLike[str], *names: str) -> pathlib.Path:
    """Return where a file or folder lies on this machine; of a store it is copied first, as far as it has changed.

    Processes of one machine that ask for the same wait for one another.

    Args:
      path: of this machine, which is returned as it is, or of a store.
      names: of a folder's files: patterns (`fnmatch`) of the names wanted from the folder itself. None: all files below it but
        the checkpoints of a run.

    Raises:
      InputError: there is no such thing in the store, or it cannot be reached.
    """
    there = as_path(path)
    if isinstance(there, pathlib.Path):
        return there
    url = str(there).rstrip("/")
    scheme, _, key = url.partition("://")
    here = cache() / scheme / key
    with store_errors(url), _locked(url):
        system = _fresh(scheme)
        found = {}
        for entry, about in system.find(key, detail=True).items():
            name = entry.removeprefix(key).lstrip("/")
            # What stands for a folder is none of its files; dots would lead out of the cache.
            if about["type"] == "file" and not entry.endswith("/") and not {".", ".."} & set(name.split("/")):
                found[name] = about
        if "" in found and len(found) > 1:
            del found[""]
        if not found:
            raise InputError(f"{url}: there is nothing there; look at it with the store's own tools")
        for name, about in sorted(found.items()):
            whole = not names and not name.startswith("checkpoints/")
            if not name or whole or any("/" not in name and fnmatch.fnmatch(name, wanted) for wanted in names):
                _copied(system, f"{key}/{name}" if name else key, about, here / name if name else here)
        if "" not in found and not here.is_dir():
            raise InputError(f"{url} holds none of {', '.join(names) or 'the files of a run'}; it has {_some(found)}")
        if here.is_dir():
            # What the store no longer has would be taken for a part of what it has.
            for copy in here.glob("*" if names else "**/*"):
                if copy.is_file() and copy.relative_to(here).as_posix() not in found:
                    copy.unlink()
    return here


def origin(here: pathlib.Path) -> str | None:
    """Return the path in a store of a file that `download` copied; None of any other."""
    try:
        scheme, *parts = here.absolute().relative_to(cache().absolute()).parts
    except ValueError:
        return None
    return f"{scheme}://{'/'.join(parts)}" if scheme in SCHEMES else None


def listdir(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the files of a store's folder itself, or [] where there is none."""
    there = as_path(path)
    scheme, _, key = str(there).rstrip("/").partition("://")
    with store_errors(there):
        system = _fresh(scheme)
        found = system.ls(key, detail=True) if system.isdir(key) else []
    return sorted(name for about in found if about["type"] == "file" and (name := about["name"].rpartition("/")[2]))


@contextlib.contextmanager
def written(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[pathlib.Path]:
    """Yield where to write a file or a folder that is to stand at ``path``: there, or where it is put from at the end.

    Raises:
      InputError: without ``overwrite``, something stands there, in a store; on this machine that is for who writes to see to.
      StoreError: as `upload`.
    """
    there = as_path(path)
    if isinstance(there, pathlib.Path):
        yield there
        return
    with store_errors(there):
        if not overwrite and there.exists():
            raise InputError(f"{there} exists: give another path, or remove it")
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="made_", dir=cache()) as folder:
        made = pathlib.Path(folder) / there.name
        yield made
        upload(made, there)


def upload(made: pathlib.Path, there: str | os.PathLike[str]) -> None:
    """Copy a file, or a folder with all below it, to a store, in the place of what is there.

    What stands there goes when all of a new folder is up, beside it; of a folder `LAST` are put last.

    Raises:
      StoreError: the store cannot be reached, or takes no more.
    """
    url = os.fspath(there).rstrip("/")
    scheme, _, key = url.partition("://")
    if "/" not in key and made.is_dir():
        raise StoreError(f"{url} is a whole bucket: name a folder in it")
    with store_errors(url, StoreError):
        system = _fresh(scheme)
        if made.is_file():
            system.put_file(str(made), key)
            system.invalidate_cache()
            return
        files = [file.relative_to(made).as_posix() for file in sorted(made.rglob("*")) if file.is_file()]
        files.sort(key=lambda name: (name.endswith(".json"), name.rpartition("/")[2] in LAST))
        old = system.isdir(key)
        to = f"{key}.partial" if old else key
        for name in files:
            system.put_file(str(made / name), f"{to}/{name}")
        if old:
            system.rm(key, recursive=True)
            for name in files:
                system.copy(f"{to}/{name}", f"{key}/{name}")
            system.rm(to, recursive=True)
        system.invalidate_cache()


def target(path: str, option: str) -> Place:
    """Return the file that a command's ``option`` asks to write; raises `InputError` where there is no folder for it."""
    file = as_path(path)
    if isinstance(file, pathlib.Path) and not file.absolute().parent.is_dir():
        raise InputError(f"{option} {file}: there is no folder {file.parent}; make it first")
    return file


def size(path: Place) -> int:
    """Return the bytes of a file."""
    return path.stat().st_size if isinstance(path, pathlib.Path) else int(path.stat().length or 0)


@contextlib.contextmanager
def store_errors(path: str | os.PathLike[str], kind: type[Exception] = InputError) -> Iterator[None]:
    """Turn whatever a store answers into one line, of type ``kind``, that names it; errors of paths of this machine stay."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Each package of a store has its own errors, of no common kind: no bucket, no credentials, no network.
        if not remote(path):
            raise
        reason = " ".join(str(error).split())[:300]
        raise kind(
            f"{os.fspath(path)} cannot be reached ({type(error).__name__}: {reason}): check the bucket, your credentials and "
            "the network"
        ) from None


def cache() -> pathlib.Path:
    """Return the folder of what was copied from stores and of what is on its way there."""
    return pathlib.Path(os.environ.get(CACHE) or "~/.cache/dsee_jax").expanduser()


def scratch(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return a folder of this machine for what is long in the making and goes to ``path``, the same each time; its own."""
    folder = cache() / "unfinished" / _digest(os.fspath(path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear(folder: pathlib.Path) -> None:
    """Remove a folder of `scratch`."""
    shutil.rmtree(folder, ignore_errors=True)


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


@contextlib.contextmanager
def _locked(url: str) -> Iterator[None]:
    folder = cache() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _digest(url)).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _copied(system: Any, key: str, about: dict[str, Any], here: pathlib.Path) -> None:
    """Copy one object, unless the copy that is there was made of it as it is now."""
    stamp = cache() / "stamps" / _digest(str(here))
    now = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    if here.is_file() and stamp.is_file() and stamp.read_text() == f"{now} {here.stat().st_size}":
        return
    here.parent.mkdir(parents=True, exist_ok=True)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    beside = here.with_name(f".{here.name}.partial")
    try:
        system.get_file(key, str(beside))
        if (held := beside.stat().st_size) != about["size"]:
            raise OSError(f"{held} bytes of {about['size']} came")
        beside.replace(here)
    finally:
        beside.unlink(missing_ok=True)
    stamp.write_text(f"{now} {here.stat().st_size}")


def _some(found: dict[str, Any]) -> str:
    names = sorted(found)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
