"""Output for a person while a command runs: progress bars, lines and sizes."""

import contextlib
import importlib.util
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from dsee_jax.runtime import terminal

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


@contextlib.contextmanager
def bar(name: str, done: int, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show the progress of ``total`` steps on stderr, where `draws_bars`; yields ``advance(steps done, text)``."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from dsee_jax.runtime import multihost  # imports JAX, which --help does not need

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    drawn = draws_bars() and multihost.is_main()
    with Progress(*columns, console=Console(stderr=True), disable=not drawn) as progress:
        task = progress.add_task(name, total=total, completed=done, note="")
        yield lambda steps, note: progress.update(task, completed=steps, note=note)


def draws_bars() -> bool:
    """Return whether `bar` is seen: on a terminal, or in a notebook, which needs ipywidgets for it."""
    from rich.console import Console

    if Console(stderr=True).is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return terminal.draws_bars()


def line(metrics: dict[str, float]) -> str:
    """Return metrics as one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def size(count: float) -> str:
    """Return a number of bytes as text: three significant digits, in powers of 1000, such as ``1.23 GB``."""
    power = 0
    while count >= 999.5 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {UNITS[power]}"


def plain(text: str) -> str:
    """Return a name or path from outside as one printable line: control characters, and the like, as their escapes."""
    return "".join(_escaped(character) if _unprintable(character) else character for character in text)


def _unprintable(character: str) -> bool:
    # Control, format (such as right-to-left marks) and unassigned characters, surrogates; separators of lines.
    kind = unicodedata.category(character)
    return kind[0] == "C" or kind in ("Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def show(value: Any) -> None:
    """Print text or a table on stdout; lines are never wrapped.

    Names in it are shown as they are: markup in them means nothing, and control characters are escaped.
    """
    if isinstance(value, str):
        print("\n".join(map(plain, value.split("\n"))), flush=True)
        return
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(plain(text), **options)

    width = None if sys.stdout.isatty() else 100
    Plain(width=width, markup=False, emoji=False).print(value)
