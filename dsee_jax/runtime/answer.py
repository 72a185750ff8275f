"""``--json [FILE]``: the answer of a command as one strict JSON object, for programs."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsee_jax.runtime import console, storage
from dsee_jax.runtime.storage import Place

_STDOUT = "-"


def arguments(parser: argparse.ArgumentParser, *, only: str = "") -> None:
    """Add ``--json [FILE]``; ``only`` begins its help with the condition under which it is valid."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help=f"{only}print all figures as one JSON object in place of the tables; with FILE, also write them to this file",
    )


class Answer(NamedTuple):
    """Where the figures of a command go: to a file beside the tables, or to stdout in their place."""

    file: Place | None = None
    printed: bool = False

    def show(self, value: Any) -> None:
        """Show a text or a table, unless the figures are printed in its place."""
        if not self.printed:
            console.show(value)

    def say(self, line: str) -> None:
        """Show a remark that the figures do not hold; on stderr, where stdout is for the figures."""
        if self.printed:
            print(console.plain(line), file=sys.stderr, flush=True)
        else:
            console.show(line)

    def give(self, figures: Mapping[str, Any]) -> None:
        """Print or write the figures, if ``--json`` is there. A float that is not finite becomes null."""
        from dsee_jax.runtime import files  # imports JAX, which --help does not need

        if self.printed:
            print(files.dumps(figures), flush=True)
        elif self.file:
            files.write(self.file, figures)


def wanted(options: argparse.Namespace) -> Answer:
    """Return the answer that ``--json`` asks for; raises `InputError` if FILE cannot be written."""
    if options.json == _STDOUT:
        return Answer(printed=True)
    return Answer(storage.target(options.json, "--json") if options.json else None)
