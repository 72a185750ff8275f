"""Compiled programs stay in the user's cache folder: the second start of a run loads them instead of compiling.

JAX writes and finds the programs. Its key of a program holds the program, the options and flags of the compiler, the versions
of jaxlib and of the platform, and the device; of a CPU its instruction sets too, so hosts with different CPUs can share a home
folder. A lock lets any number of processes share the folder.
"""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import filelock

from dsee_jax.runtime import job

log = logging.getLogger(__name__)

BYTES, PROGRAMS = 2 << 30, 1000
"""The most bytes and programs of the folder; the least recently used ones go first. JAX reads the time of every program before
it writes one, which is slow for many."""

SECONDS = 0.1
"""The shortest compilation whose program is kept: others are compiled again in the time that keeping them takes."""

LOCKED = 10
"""Seconds that a start waits for the lock."""

_OPTIONS = {
    "jax_compilation_cache_max_size": BYTES,
    "jax_persistent_cache_min_compile_time_secs": SECONDS,
    # The further caches of XLA for GPUs grow without bound.
    "jax_persistent_cache_enable_xla_caches": "none",
}
_PROGRAM, _USED, _LOCK = "-cache", "-atime", ".lockfile"
"""The files of JAX in the folder: a program, the time of its last use, and the lock."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `use` reads."""
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile every program, and keep none in ~/.cache/dsee_jax/compiled for the next start",
    )


def use(options: argparse.Namespace) -> None:
    """Do as the flag of `arguments` says; by default `enable`, but not in a job of several processes.

    In such a job JAX keeps the programs of process 0 only. Processes of hosts with disks of their own would then disagree on
    whether a program must be compiled, and some compilations wait for all processes.
    """
    if options.no_compilation_cache:
        import jax

        jax.config.update("jax_enable_compilation_cache", False)
    elif not job.is_named(options):
        enable()


def enable() -> Path | None:
    """Let JAX keep the compiled programs of this process in `folder`, of at most `BYTES` and about `PROGRAMS`.

    Commands call this function at their start; importing the library changes nothing. Call it in your own process before the
    first computation. The user's choice stays: ``JAX_ENABLE_COMPILATION_CACHE=false``, a folder in
    ``JAX_COMPILATION_CACHE_DIR`` or in ``jax.config``, and the environment variables of the options.

    Returns:
      The folder of the programs; None where the cache is turned off, or, with a warning, where there is no home folder, or a
      folder that this user cannot write or that others can.
    """
    import jax

    config: Any = jax.config  # its options are attributes that a type checker does not see
    if not config.jax_enable_compilation_cache:
        return None
    if config.jax_compilation_cache_dir:
        return Path(config.jax_compilation_cache_dir)
    place: Path | str = "the cache folder of this user"
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(place)
        _tidy(place)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        log.warning(
            "%s: compiled programs are not kept there (%s), and the next start compiles them again: set "
            "JAX_COMPILATION_CACHE_DIR to a folder that you may write, or give --no-compilation-cache",
            *(place, reason),
        )
        return None
    for name, value in _OPTIONS.items():
        if name.upper() not in os.environ:
            config.update(name, value)
    config.update("jax_compilation_cache_dir", str(place))
    return place


def folder() -> Path:
    """Return the folder of the compiled programs of this user: ``$XDG_CACHE_HOME/dsee_jax/compiled``, by default in
    ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsee_jax" / "compiled"


def _check_owner(place: Path) -> None:
    """Raise `PermissionError` for a folder that others may write: programs are code."""
    about = place.stat()
    if hasattr(os, "geteuid") and (about.st_uid != os.geteuid() or about.st_mode & 0o022):
        raise PermissionError("other users may write it")


def _tidy(place: Path) -> None:
    """Delete the programs whose write was interrupted, and the least recently used ones above `PROGRAMS`."""
    with filelock.FileLock(place / _LOCK, timeout=LOCKED):
        names = {entry.name: entry.stat().st_mtime for entry in os.scandir(place)}
        programs = [name.removesuffix(_PROGRAM) for name in names if name.endswith(_PROGRAM)]
        # JAX writes the time of use last. Without it, JAX 0.10 writes no further program into the folder.
        used = {key: names[key + _USED] for key in programs if key + _USED in names}
        kept = sorted(used, key=used.__getitem__)[-PROGRAMS:]
        for key in {*programs}.difference(kept):
            (place / f"{key}{_PROGRAM}").unlink(missing_ok=True)
            (place / f"{key}{_USED}").unlink(missing_ok=True)
