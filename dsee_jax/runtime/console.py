"""What a person sees while a command runs: progress bars, lines and sizes."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsee_jax.runtime import multihost


@contextlib.contextmanager
def bar(name: str, done: int, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show the progress of ``total`` steps on stderr; yields ``advance(steps done, text)``. Silent when not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (console.is_terminal and multihost.is_main())) as progress:
        task = progress.add_task(name, total=total, completed=done, note="")
        yield lambda steps, note: progress.update(task, completed=steps, note=note)


def line(metrics: dict[str, float]) -> str:
    """Return metrics as one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def size(count: float) -> str:
    """Return a number of bytes for a person, in powers of 1000."""
    power = min(max(len(str(int(count))) - 1, 0) // 3, 4)
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def show(value: Any) -> None:
    """Print a line or a table on stdout; lines are never wrapped."""
    if isinstance(value, str):
        print(value, flush=True)
    else:
        wide = None if sys.stdout.isatty() else 100
        Console(width=wide).print(value)
