"""The pictures of the README and of the documentation, from the stored results of other benchmarks.

    pip install '.[plot]'
    python -m benchmarks.overview

``docs/_static/scores.svg``: score against FLOPs and trained share, of ``benchmarks/results/glue.json`` and ``smaller.json``;
SST-2 and STS-B alone, since RTE's dev set is too small to distinguish the methods.
``docs/_static/speed.svg``: score against measured speed, of ``benchmarks/results/methods.json``; only where that file exists.
"""

import json
from typing import Any, NamedTuple

import matplotlib

from benchmarks import methods
from benchmarks.runs import RESULTS, ROOT
from dsee_jax.analysis.pictures.style import COLOURS, GREY, figure

STATIC = ROOT / "docs" / "_static"
TASKS = {"sst2": "SST-2, accuracy", "stsb": "STS-B, Pearson correlation"}
METHODS = {
    "full": ("full fine-tuning", COLOURS[5], "s"),
    "lora": ("LoRA", COLOURS[0], "o"),
    "dsee": ("DSEE, half of the weights zero", COLOURS[1], "D"),
    "cut": ("DSEE, heads and neurons removed", COLOURS[2], "^"),
}
"""Label, colour and marker."""


class Point(NamedTuple):
    """One method on one task."""

    method: str
    flops: float
    """Percent of those of the pretrained model, at inference."""
    trained: float
    """Percent of the parameters of the backbone."""
    score: float
    """Mean over seeds, x 100."""


def points(task: str) -> list[Point]:
    """Return the points of a task."""
    glue, smaller = (json.loads((RESULTS / name).read_text()) for name in ("glue.json", "smaller.json"))
    rows = [(row["method"], row) for row in glue["rows"]]
    rows += [("cut", row) for row in smaller["cut"] if "by ticket" in row["method"]]
    return [
        Point(
            method,
            100 * row["flops_ratio"],
            100 * row["trainable_fraction"],
            sum(row["scores"]) / len(row["scores"]),
        )
        for method, row in rows
        if row["task"] == task
    ]


def draw() -> Any:
    """Return the figure, one panel for each task."""
    picture = figure(8.4, 3.1)
    handles: dict[str, Any] = {}
    panels = picture.subplots(1, len(TASKS))
    for axes, (task, title) in zip(panels, TASKS.items(), strict=True):
        for point in points(task):
            label, colour, mark = METHODS[point.method]
            place = (point.flops, point.score)
            handles[label] = axes.scatter(*place, color=colour, marker=mark, s=50, zorder=3)
            share = f"{point.trained:.3g} % trained"
            axes.annotate(share, place, (0, 8), textcoords="offset points", ha="center", fontsize=7.5, color="#555555")
        axes.set(title=title, xlabel="FLOPs at inference, % of the pretrained model", xlim=(42, 112))
        axes.margins(y=0.25)
        axes.grid(color=GREY, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("score on the dev set")
    picture.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return picture


KINDS = {
    "full": ("full fine-tuning", COLOURS[5], "s"),
    "lora": ("LoRA", COLOURS[0], "o"),
    "dsee": ("DSEE, zeros among the weights", COLOURS[1], "D"),
    "cut": ("cut to fewer FLOPs", COLOURS[2], "^"),
}
"""The start of the name of a method -> label, colour and marker."""


def draw_speed(rows: list[dict[str, Any]]) -> Any:
    """Return the figure of measured speed, one panel for each model and task.

    Args:
      rows: those of ``methods.json``; the rows without a measured speed, and ablations, are left out.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["throughput_ratio"] and row["method"] in methods.METHODS:
            panels.setdefault(row["title"], []).append(row)
    picture, handles = figure(4.2 * len(panels), 3.4), {}
    for axes, (title, points) in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for row in points:
            kind, _, amount = row["method"].partition("_")
            label, colour, mark = KINDS[kind]
            place = (row["throughput_ratio"], row["mean"])
            # The interval of two seeds, 12.7 standard errors to each side, would fill the panel.
            interval = row["interval"] if len(row["scores"]) > 2 else None
            handles[label] = axes.errorbar(
                *place, yerr=interval, color=colour, marker=mark, linestyle="", capsize=2, zorder=3
            )
            axes.annotate(
                f"{amount} %" if amount else "",
                place,
                (6, 4),
                textcoords="offset points",
                fontsize=7.5,
                color="#555555",
            )
        axes.set(title=title, xlabel="measured throughput, pretrained model = 1", ylabel=f"{points[0]['score']} x 100")
        axes.margins(0.2)
        axes.grid(color=GREY, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    picture.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return picture


def main() -> None:
    pictures = {"scores.svg": draw}
    if (RESULTS / "methods.json").exists():
        rows = json.loads((RESULTS / "methods.json").read_text())["rows"]
        pictures["speed.svg"] = lambda: draw_speed(rows)
    # Equal results give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "scores", "svg.fonttype": "none", "font.size": 9}):
        for name, picture in pictures.items():
            picture().savefig(STATIC / name, metadata={"Date": None}, facecolor="white")
            print((STATIC / name).relative_to(ROOT))


if __name__ == "__main__":
    main()
