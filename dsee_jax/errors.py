"""The one error for input that a user can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: one line that names what was found, what was expected and how to fix it. Commands exit with status 2."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of ``options``, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
