"""The picture of the README: score against FLOPs and trained share, from the stored results of other benchmarks.

    pip install '.[plot]'
    python -m benchmarks.overview

Reads ``benchmarks/results/glue.json`` and ``smaller.json``; writes ``docs/_static/scores.svg``. SST-2 and STS-B alone: RTE's
dev set is too small to distinguish the methods.
"""

import json
from typing import Any, NamedTuple

import matplotlib

from benchmarks.glue import RESULTS, ROOT
from dsee_jax.analysis.pictures.style import COLOURS, GREY, figure

OUT = ROOT / "docs" / "_static" / "scores.svg"
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


def main() -> None:
    # Equal results give an equal file.
    with matplotlib.rc_context({"svg.hashsalt": "scores", "svg.fonttype": "none", "font.size": 9}):
        draw().savefig(OUT, metadata={"Date": None}, facecolor="white")
    print(OUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
