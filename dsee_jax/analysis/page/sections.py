"""The sections of a page, each a function of all runs; a section without anything to show is empty."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsee_jax.analysis.page import charts
from dsee_jax.analysis.page.charts import Line
from dsee_jax.analysis.page.markup import Markup, join, tag
from dsee_jax.analysis.page.run_files import RunFigures
from dsee_jax.analysis.pictures.kept import by_layer
from dsee_jax.train.report import NAMES, costs, rows, scored_on

Runs = Sequence[RunFigures]

FOLDED = 24
"""The most kernels of a run whose supports are shown at once; more are folded behind their number."""


def legend(runs: Runs) -> Markup:
    """Return the runs with their colours."""
    items = [
        tag("li", _run(number, f"{run.name} · {run.results['task']}, seed {run.results['seed']}"))
        for number, run in enumerate(runs)
    ]
    return tag("ul", *items, class_="runs")


def _run(number: int, text: str) -> Markup:
    """Return a text beside the sample of the line of a run."""
    return tag("span", charts.key(number), tag("span", text), class_="key")


def scores(runs: Runs) -> Markup:
    """Return the table of scores by stage, with the steps of each."""
    columns = list(dict.fromkeys(name for run in runs for name in run.results["final"]))
    head = [*["run"] * (len(runs) > 1), "stage", *columns, "steps", "evaluations"]
    body = []
    for number, run in enumerate(runs):
        stages = rows(run.results)
        for place, stage in enumerate(stages):
            values = [stage["metrics"].get(name) for name in columns]
            named = len(runs) > 1 and place == 0
            cells = [
                tag("th", _run(number, run.name), scope="rowgroup", rowspan=len(stages)) if named else None,
                tag("td", NAMES.get(stage["name"], stage["name"])),
                *(_number("" if value is None else f"{value:.4f}") for value in values),
                *(_number(f"{stage[key]:,}" if key in stage else "") for key in ("steps", "evaluations")),
            ]
            body.append(tag("tr", *cells))
    on = dict.fromkeys(scored_on(run.results) for run in runs)
    note = f"Scores on {', or '.join(on)}. A stage that trains has those of its best evaluation."
    return _section("Stages", note, _table(head, body, numbers=len(columns) + 2))


def cost(runs: Runs) -> Markup:
    """Return the table of costs: one row per figure, one column per run."""
    tables = [dict(costs(run.results)) for run in runs]
    body = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", table.get(name, "")) for table in tables))
        for name in dict.fromkeys(name for table in tables for name in table)
    ]
    head = ["", *(_run(number, run.name) for number, run in enumerate(runs))] if len(runs) > 1 else []
    return _section("Costs", None, _table(head, body, kind="wide wrap"))


def curves(runs: Runs) -> Markup:
    """Return the training loss, the learning rate and every dev score by step, all runs in one chart each."""
    marks = (
        dict(sorted(_marks(runs[0]).items(), key=lambda mark: mark[1])) if _same([_marks(run) for run in runs]) else {}
    )

    def chart(title: str, of: Callable[[Any], Any]) -> Markup:
        series = [Line(run.name, _points(run, of), number) for number, run in enumerate(runs)]
        return charts.lines(title, series, x_label="step", marks=marks)

    metrics = dict.fromkeys(name for run in runs for _, record in run.placed for name in record.get("metrics", {}))
    drawn = [
        chart("training loss", lambda record: record.get("loss")),
        *(chart(f"dev {name}", lambda record, name=name: record.get("metrics", {}).get(name)) for name in metrics),
        chart("learning rate", lambda record: record.get("learning_rate")),
    ]
    note = "Steps count from the start of the run. Point at a mark for its numbers."
    return _section("Curves", note, tag("div", *drawn, class_="charts")) if any(drawn) else Markup("")


def zeros(runs: Runs) -> Markup:
    """Return the share of zeros in every kernel of each run that has any."""
    parts = []
    for run in runs:
        counts = run.zeros
        if counts is None or not np.nansum(counts.zeros):
            continue
        body = []
        for kernel, zero, entries in zip(counts.kernels, counts.zeros, counts.entries, strict=True):
            cells = [_heat(share) for share in zero / entries]
            body.append(tag("tr", tag("th", kernel, scope="row"), *cells))
        head = ["kernel", *map(str, range(counts.zeros.shape[1]))]
        total = np.nansum(counts.zeros) / np.nansum(counts.entries)
        parts += [_title(runs, run, f"{total:.1%} of these kernels"), _table(head, body, kind="heat")]
    note = (
        "Per cent of the weights that are zero, by kernel and layer. The updates are beside the weights, not in them."
    )
    return _section("Zeros", note, *parts) if parts else Markup("")


def units(runs: Runs) -> Markup:
    """Return the kept layers, and the kept heads and neurons of every layer, of each run that pruned any."""
    drawn = []
    for run in runs:
        for kind, layers in by_layer(run.kept).items():
            kept = {name.rpartition("_")[2]: flags for name, flags in layers.items()}
            total, full = (sum(map(count, kept.values())) for count in (np.sum, len))
            caption = f"{total:,} of {full:,} {kind} kept"
            drawn.append(charts.strip(caption if len(runs) == 1 else f"{run.name}: {caption}", kind, kept))
    note = "One row per layer. A cell is a unit, or a block of units with the kept share as its strength."
    return _section("Kept units", note, tag("div", *drawn, class_="charts")) if drawn else Markup("")


def ranks(runs: Runs) -> Markup:
    """Return the effective rank of the updates by layer, one chart per kind of kernel."""
    drawn = []
    for kind in dict.fromkeys(kind for run in runs for kind in run.updates):
        series = [
            Line(run.name, [(int(layer), update.rank) for layer, update in _layers(run, kind)], number)
            for number, run in enumerate(runs)
        ]
        drawn.append(charts.lines(kind, series, x_label="layer", zero=True))
    note = (
        "The effective rank of A B + S: exp of the entropy of its normalised singular values (Roy and Vetterli 2007). "
        "It is at most the rank of the factors plus the number of rows with sparse entries."
    )
    return (
        _section("Effective rank of the updates", note, tag("div", *drawn, class_="charts"))
        if any(drawn)
        else Markup("")
    )


def supports(runs: Runs) -> Markup:
    """Return where the entries of S lie in every kernel."""
    parts = []
    for number, run in enumerate(runs):
        drawn = [
            charts.support(f"{kind} {layer}", update.support, update.shape, number)
            for kind in run.updates
            for layer, update in sorted(run.updates[kind].items(), key=lambda item: (len(item[0]), item[0]))
            if len(update.support)
        ]
        if drawn:
            opened = "open" if len(drawn) <= FOLDED else None
            title = tag("summary", _title(runs, run, f"{len(drawn)} kernels"))
            parts.append(tag("details", title, tag("div", *drawn, class_="small"), open=opened))
    note = (
        "Each square is a kernel: inputs from top to bottom, outputs from left to right. Bars count the entries by input and "
        "by output."
    )
    return _section("Where the sparse updates lie", note, *parts) if parts else Markup("")


SECTIONS: tuple[Callable[[Runs], Markup], ...] = (scores, cost, curves, zeros, units, ranks, supports)
"""The sections in their order."""


def _section(title: str, note: str | None, *content: Markup) -> Markup:
    return tag("section", tag("h2", title), tag("p", note) if note else None, *content)


def _title(runs: Runs, run: RunFigures, about: str) -> Markup:
    return tag("h3", about if len(runs) == 1 else f"{run.name}: {about}")


def _table(head: Sequence[str], body: Sequence[Markup], *, numbers: int = 0, kind: str = "wide") -> Markup:
    """Return a table that scrolls in its own box; its last ``numbers`` columns are numbers."""
    words = len(head) - numbers
    cells = [
        tag("th", text, scope="col", class_="number" if place >= words else None) for place, text in enumerate(head)
    ]
    content = join(tag("thead", tag("tr", *cells)) if head else None, tag("tbody", *body))
    # A box that scrolls takes the focus, so that arrow keys move it.
    return tag(
        "div", tag("table", content, class_=kind), class_="scroll fit" if kind == "heat" else "scroll", tabindex="0"
    )


def _number(text: str) -> Markup:
    return tag("td", text, class_="number")


def _heat(share: float) -> Markup:
    if not np.isfinite(share):
        return tag("td", class_="none")
    kind = "on" if share > 0.65 else None
    return tag("td", f"{100 * share:.0f}", class_=kind, style=f"--share:{share:.3f}")


def _points(run: RunFigures, of: Callable[[Any], Any]) -> list[tuple[float, float]]:
    return [(at, value) for at, record in run.placed if (value := of(record)) is not None]


def _marks(run: RunFigures) -> dict[str, float]:
    """Return the first step of each stage; stages that begin at one step share a mark."""
    shared: dict[int, list[str]] = {}
    for stage, step in run.begin.items():
        if stage != "before":
            shared.setdefault(step, []).append(stage)
    return {", ".join(stages): step for step, stages in shared.items()}


def _same(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _layers(run: RunFigures, kind: str) -> list[tuple[str, Any]]:
    layers = run.updates.get(kind, {})
    return sorted(
        ((layer, update) for layer, update in layers.items() if layer.isdigit()), key=lambda item: int(item[0])
    )
