"""Errors of the input and of the machine are one line with the right status; bugs are tracebacks that ask for a report."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from dsee_jax.errors import InputError, Stopped
from dsee_jax.runtime import command
from dsee_jax.runtime.storage import StoreError

ROOT = pathlib.Path(__file__).parents[2]


def raising(error):
    def work():
        raise error

    return work


def os_error(number, *paths):
    return OSError(number, os.strerror(number), *paths)


LINES = {
    "input": (InputError("x is 3; expected 2"), 2, "it: x is 3; expected 2"),
    "stop": (Stopped("the loss is NaN"), 1, "it: the loss is NaN"),
    "store": (StoreError("gs://x is away"), 1, "it: gs://x is away; again"),
    "ctrl-c": (KeyboardInterrupt(), 130, "it: interrupted; again"),
    "memory": (MemoryError(), 1, "it: the memory of this machine is full; again"),
    "device memory": (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore"), 1, "(RESOURCE_EXHAUSTED: 9 bytes)"),
    "read-only": (os_error(errno.EROFS, "/a"), 1, "it: /a: Read-only file system"),
    "rename": (os_error(errno.EXDEV, "/a", None, "/b"), 1, "it: /a to /b: Invalid cross-device link"),
    "bytes": (os_error(errno.EACCES, b"/\xff"), 1, "it: /\\udcff: Permission denied"),
    "long name": (os_error(errno.ENAMETOOLONG, "/a"), 1, "it: /a: File name too long"),
    "full disk": (os_error(errno.ENOSPC), 1, "it: No space left on device; again"),
    "open files": (os_error(errno.EMFILE), 1, "it: Too many open files"),
    "two lines and an escape": (InputError("a\nb\x1b[31m"), 2, "it: a\\nb\\x1b[31m"),
}


@pytest.mark.parametrize("name", LINES)
def test_error_is_one_line_and_a_status(capsys, name):
    error, status, line = LINES[name]
    assert command.run("it", [], raising(error), resume="again") == status
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("x"), os_error(errno.EINVAL), RuntimeError("x"), KeyError("x")])
def test_bug_is_raised_with_a_note(error):
    with pytest.raises(type(error)) as raised:
        command.run("it", [], raising(error))
    assert raised.value.__notes__ == ["it: this is a bug; please report it with the command and all lines above"]


def test_argument_that_is_no_text_is_refused(capsys):
    assert command.run("it", ["--prompt", "\udcff"], raising(AssertionError)) == 2
    assert "the argument '\\udcff' is not UTF-8 text" in capsys.readouterr().err


SHELL = {
    "closed pipe": ("print('line ' * 99999)", "| head -c 1 >/dev/null", command.CLOSED, ""),
    "closed pipe of a flushed line": ("[print(n, flush=True) for n in range(99999)]", "| head -1 >/dev/null", 141, ""),
    "full stdout": ("print('x')", "> /dev/full", 1, "it: stdout: No space left on device\n"),
    "closed stdout": ("print('x'); open('/dev/null').close()", ">&-", 0, ""),
    "closed stderr": ("raise InputError('x')", "2>&-", 2, ""),
    "ascii": ("print('naïve'); raise InputError('naïve')", "> /dev/null", 2, "it: na\\xefve\n"),
}


@pytest.mark.parametrize("name", SHELL)
@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs the devices of Linux and a shell")
def test_streams_of_a_process(name):
    work, redirection, status, line = SHELL[name]
    code = (
        "import sys; from dsee_jax.errors import InputError; from dsee_jax.runtime import command\n"
        f"def work(): {work}\n"
        "command.start(lambda arguments: command.run('it', arguments, work))"
    )
    script = f'set -o pipefail; "$0" -c "$1" {redirection}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr, done.stdout[:3]) == (status, line, "")


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["xyz", "cuda"])
def test_missing_device_is_one_line(platforms):
    code = (
        "import sys, jax; from dsee_jax.runtime import command\n"
        "command.start(lambda arguments: command.run('it', arguments, jax.devices))"
    )
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"it: JAX finds no device (JAX_PLATFORMS is '{platforms}'")


def test_override_with_a_space_is_no_file():
    words = ["a config.yaml", "--data.dir=my data", "--output_dir=my run", "--distributed", "--x=a b"]
    assert command.split(words) == ([words[0], *words[3:]], words[1:3])
