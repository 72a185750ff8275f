"""The errors that a command reports as one line."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input that the user can fix. One line names the input, the expectation and the fix. Commands exit with status 2."""


class Stopped(RuntimeError):
    """The work ends early, for a reason that one line names. A subclass sets the exit status of the command."""

    status = 1


class Diverged(Stopped):
    """Training values are no longer finite."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of ``options``, or an empty string if no option is near."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def shorten(text: str) -> str:
    """Return the beginning of a value that is too long for an error."""
    return text if len(text) <= 100 else f"{text[:100]}..."
