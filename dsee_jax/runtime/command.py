"""The frame of every command: the exit status, and errors of the input or of the machine as one line on stderr."""

import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dsee_jax.errors import InputError, Stopped
from dsee_jax.runtime import console, terminal
from dsee_jax.runtime.storage import StoreError

INTERRUPTED, CLOSED = 130, 141
"""The exit statuses of a shell for a process that SIGINT, or SIGPIPE, killed."""

_OVERRIDE = re.compile(r"--(\w+\.[\w.]*|output_dir)=")

STDOUT = "stdout"
"""The name of stdout in errors."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MACHINE = _FULL | {errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""The errors of the machine that Python raises without a path where a file is open already."""


def run(name: str, arguments: Sequence[str], work: Callable[[], Any], *, resume: str = "") -> int:
    """Do the work of a command, and return its exit status.

    ====  =====================================================================================
    0     done
    1     the machine or a store failed, or the work cannot go on (`dsee_jax.errors.Stopped`)
    2     bad input (`InputError`)
    130   Ctrl-C
    141   the reader of stdout has ended (``| head -1``); nothing is printed
    143   SIGTERM
    ====  =====================================================================================

    Every other error is a bug: it passes, with a note that asks for a report.

    Args:
      name: the command, which begins the line.
      arguments: the words of the command line.
      work: the command.
      resume: how to go on after an interruption; a part of the line.
    """
    resume = resume and f"; {resume}"
    try:
        for word in arguments:
            _check_utf8(word)
        import jax

        # The rules that a notebook sets in the environment do not change the results of a command.
        with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
            work()
        sys.stdout.flush()
    except InputError as error:
        return _fail(name, str(error), 2)
    except Stopped as stop:
        return _fail(name, str(stop), stop.status)
    except StoreError as error:
        return _fail(name, f"{error}{resume}", 1)
    except KeyboardInterrupt:
        return _fail(name, f"interrupted{resume}", INTERRUPTED)
    except MemoryError:
        return _fail(name, f"the memory of this machine is full{resume}", 1)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename == STDOUT:
            return CLOSED
        if line := _machine(error):
            return _fail(name, line + resume * (getattr(error, "errno", None) in _FULL), 1)
        error.add_note(f"{name}: this is a bug; please report it with the command and all lines above")
        raise
    return 0


def start(main: Callable[[list[str]], int]) -> NoReturn:
    """Run the ``main`` of a command on the words of the command line, and exit with its status."""
    # Files that are opened later must not take the place of a closed stdin, stdout or stderr.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    terminal.silence_bars()
    # A log message that stdout does not take is lost; the next line of the command fails in its place.
    logging.raiseExceptions = False
    # A character that the encoding of stdout lacks is shown as an escape.
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(stdout.fileno(), "w", closefd=False)),
        *(stdout.encoding, "backslashreplace"),
        line_buffering=stdout.isatty(),
    )
    try:
        status = main(sys.argv[1:])
    except SystemExit as stop:  # of argparse, after its help or an error
        status = stop.code
    try:
        sys.stdout.flush()
    except OSError as error:
        # Otherwise the interpreter writes the rest at its end, and fails.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        status = status or (CLOSED if isinstance(error, BrokenPipeError) else 1)
    sys.exit(status)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for argparse, and the overrides ``--section.key=value`` of a config.

    argparse would take an override with a space for the name of a file.
    """
    words, overrides = [], []
    for word in arguments:
        (overrides if _OVERRIDE.match(word) else words).append(word)
    return words, overrides


class _Stdout(io.FileIO):
    """The stdout of a command; its errors name it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, STDOUT) from None


def _fail(name: str, line: str, status: int) -> int:
    """Print one line, without control characters, on stderr."""
    try:
        print(f"{name}: {console.plain(line)}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads stderr; the status says the rest
        return status
    return status


def _check_utf8(word: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError:
        raise InputError(f"the argument {word!r} is not UTF-8 text; rename the file, or convert the text") from None


def _machine(error: Exception) -> str:
    """Return one line for an error of the machine; an empty text for any other error."""
    if isinstance(error, OSError) and error.filename is not None:
        path, other = error.filename, error.filename2
        return f"{os.fsdecode(path)}{f' to {os.fsdecode(other)}' if other else ''}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return str(error.strerror)
    if isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED"):
        return f"the memory of the device is full ({str(error).splitlines()[0]})"
    if reason := _no_device():
        return f"JAX finds no device ({reason}): correct or unset JAX_PLATFORMS"
    return ""


def _no_device() -> str:
    """Return the reason why JAX has no device of ``JAX_PLATFORMS``; an empty text where it has one."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.config.jax_platforms:
        return ""
    try:
        jax.devices()
    except Exception as error:
        reason = f"JAX_PLATFORMS is {jax.config.jax_platforms!r}"
        return f"{reason}; {' '.join(str(error).split())[:200]}" if str(error) else reason
    return ""
