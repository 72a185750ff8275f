"""What a person reads: progress bars, lines of metrics, the table at the end of a run."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dsee_jax import processes
from dsee_jax.stores import Place

NAMES = {
    "before": "pretrained, new head",
    "draw": "the ticket, not tuned",
    "tune": "after tuning",
    "prune": "after pruning",
    "retune": "after re-tuning",
}


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
    with Progress(*columns, console=console, disable=not (console.is_terminal and processes.first())) as progress:
        task = progress.add_task(name, total=total, completed=done, note="")
        yield lambda steps, note: progress.update(task, completed=steps, note=note)


def line(metrics: dict[str, float]) -> str:
    """Return metrics as one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def size(count: float) -> str:
    """Return a number of bytes for a person, in powers of 1000."""
    power = min(max(len(str(int(count))) - 1, 0) // 3, 4)
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the scores by stage, and what the model costs, of the content of ``metrics.json``."""
    rows = [{"name": "before", "metrics": results["before"]}, *results["stages"]]
    names = list(results["final"])
    scores = Table(title=f"{results['task']}, seed {results['seed']}: scores on the dev set", title_justify="left")
    scores.add_column("stage")
    for name in names:
        scores.add_column(name, justify="right")
    for row in rows:
        name = "pretrained" if row["name"] == "before" and not results["head_parameters"] else row["name"]
        scores.add_row(NAMES.get(name, name), *(f"{row['metrics'][key]:.4f}" for key in names))
    costs = Table(title="what it costs", title_justify="left", show_header=False)
    flops = results["flops_per_token"]
    for name, value in (
        ("trained of the backbone", f"{results['trainable_parameters']:,} = {results['trainable_fraction']:.2%}"),
        ("trained in the head", f"{results['head_parameters']:,}"),
        ("weights zero or cut out", f"{results['weight_sparsity']:.1%} of the prunable kernels"),
        ("FLOPs a token, dense", f"{flops['dense']:,}"),
        ("FLOPs a token, zeros skipped", f"{flops['final']:,} = {results['flops_ratio']:.1%}"),
        ("bytes of model and adapter", size(results["model_bytes"])),
        ("seconds of training", f"{results['train_seconds']:.0f}"),
        ("tokens a second", f"{results['train_tokens_per_second']:,.0f}"),
        ("peak memory", size(results["peak_memory_bytes"])),
    ):
        costs.add_row(name, value)
    return [scores, costs]


def final(results: dict[str, Any], out: Place, say: Callable[[Any], None]) -> None:
    """Say the tables of a finished run and where its files are."""
    for table in tables(results):
        say(table)
    say(f"model    {out / 'model'}    (Hugging Face layout, pruned weights)")
    if (out / "adapter").exists():
        say(f"adapter  {out / 'adapter'}    (low-rank + sparse updates, head, masks)")
    say(f"figures  {out / 'metrics.json'}, {out / 'metrics.jsonl'}")
    say(f"next     python -m dsee_jax evaluate {out}; python -m dsee_jax export {out} OUT --format hf")


def show(value: Any) -> None:
    """Print a line or a table on stdout; lines are never wrapped."""
    if isinstance(value, str):
        print(value, flush=True)
    else:
        wide = None if sys.stdout.isatty() else 100
        Console(width=wide).print(value)
