"""Paths of stores, by URL, with the methods of `pathlib.Path` that this library uses; fsspec reads and writes them."""

import fnmatch
import functools
import os
import pathlib
import posixpath
from collections.abc import Iterator
from typing import IO, Any

import fsspec

from dsee_jax.errors import InputError, did_you_mean

EXTRAS = {"gcsfs": "gs", "s3fs": "s3"}
"""The extras of this project by the package that they install."""

_EXAMPLES = ("gs://BUCKET/...", "s3://BUCKET/...", "az://CONTAINER/...")


class StorePath:
    """A path of a store: ``scheme://place/name``, for each scheme that fsspec knows.

    Raises:
      InputError: fsspec knows no such scheme, its package is not installed, or the URL names no place in the store.
    """

    def __init__(self, url: str):
        scheme, _, rest = url.partition("://")
        if "::" in url or {".", ".."} & set(rest.split("/")):
            raise InputError(f"{url} is no plain path of a store: write it without '::', '.' and '..'")
        if not rest.strip("/"):
            raise InputError(f"{url} names no place in the store; expected a path such as {', '.join(_EXAMPLES)}")
        _kind(scheme)
        self.url = f"{scheme}://{rest.rstrip('/')}"

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"StorePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: "StorePath") -> bool:
        return self.url < other.url

    def __truediv__(self, name: str | os.PathLike[str]) -> "pathlib.Path | StorePath":
        """Return the path of a name below; an absolute path of this machine replaces it, as in `pathlib`."""
        if os.path.isabs(name):
            return pathlib.Path(name)
        rest = self.url.partition("://")[2]
        return StorePath(f"{self.scheme}://{posixpath.normpath(posixpath.join(rest, os.fspath(name)))}")

    @property
    def scheme(self) -> str:
        """The part before ``://``."""
        return self.url.partition("://")[0]

    @property
    def inside(self) -> str:
        """The part after ``://``, without leading slashes."""
        return self.url.partition("://")[2].lstrip("/")

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> "StorePath":
        """The folder of the path; the bucket or host is its own."""
        return StorePath(self.url.rpartition("/")[0]) if "/" in self.inside else self

    @property
    def system(self) -> Any:
        """The file system of fsspec that has the path; one object for each store."""
        options = _kind(self.scheme)._get_kwargs_from_urls(self.url)
        return system(self.scheme, *sorted(options.items()))

    @property
    def key(self) -> str:
        """The path in its file system."""
        return str(_kind(self.scheme)._strip_protocol(self.url))

    def fresh(self) -> Any:
        """Return the `system` without cached listings: other processes write there too."""
        self.system.invalidate_cache()
        return self.system

    def exists(self) -> bool:
        """Return whether the store has a file or a folder here."""
        return bool(self.fresh().exists(self.key))

    def is_dir(self) -> bool:
        """Return whether the path is a folder."""
        return bool(self.fresh().isdir(self.key))

    def is_file(self) -> bool:
        """Return whether the path is a file."""
        return bool(self.fresh().isfile(self.key))

    def iterdir(self) -> Iterator["StorePath"]:
        """Yield the entries of a folder."""
        for entry in self.fresh().ls(self.key, detail=False):
            name = str(entry).rstrip("/").rpartition("/")[2]
            # Some stores list the marker of the folder itself.
            if str(entry).strip("/") != self.key.strip("/"):
                yield StorePath(f"{self.url}/{name}")

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        """Yield the entries of a folder whose names fit a pattern."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open a file in a binary mode."""
        return self.system.open(self.key, mode)

    def size(self) -> int:
        """Return the bytes of a file; 0 where the store does not tell."""
        return int(self.fresh().info(self.key)["size"] or 0)

    def read_bytes(self) -> bytes:
        """Return the content of a file."""
        return bytes(self.fresh().cat_file(self.key))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the text of a file."""
        return self.read_bytes().decode(encoding)

    def write_text(self, text: str) -> None:
        """Replace a file by a UTF-8 text, at once."""
        self.make_parent()
        self.system.pipe_file(self.key, text.encode())

    def make_parent(self) -> None:
        """Create the folder of a file in a store that has folders; object stores have none, and would make a bucket."""
        if not self.system.async_impl:
            self.system.makedirs(self.system._parent(self.key), exist_ok=True)


def is_scheme(name: str) -> bool:
    """Return whether fsspec knows a scheme of this name, of its own or of a program that registered it."""
    return name in fsspec.available_protocols() or name in fsspec.registry


@functools.cache
def system(scheme: str, *options: tuple[str, Any]) -> Any:
    """Return the file system of a scheme with the options that the URL gives."""
    return fsspec.filesystem(scheme, **dict(options))


@functools.cache
def _kind(scheme: str) -> Any:
    if not is_scheme(scheme):
        near = did_you_mean(scheme, fsspec.available_protocols())
        raise InputError(
            f"{scheme}:// is the scheme of no store{near}; expected a path of this machine, or a URL such as "
            f"{', '.join(_EXAMPLES)}"
        )
    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise InputError(f"{scheme}:// needs a package that is not installed: {_fix(error)}") from None


def _fix(error: ImportError) -> str:
    """Return the pip command for the package of a store; fsspec's own advice where that does not name the package."""
    advice = " ".join(str(error).split())
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    package = (cause.name or "").partition(".")[0]
    if package in EXTRAS:
        return f"pip install 'dsee-jax[{EXTRAS[package]}]'"
    package = package.replace("_", "-")
    return f"pip install {package} ({advice})" if package and package in advice else advice
