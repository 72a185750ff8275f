"""The picture of the README and of the documentation: score against measured speed.

    pip install '.[plot]'
    python -m benchmarks.overview

Draws ``docs/_static/speed.svg`` of ``benchmarks/results/methods.json``: means, and single seeds as dots.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib

from benchmarks import methods
from benchmarks.runs import RESULTS, ROOT
from dsee_jax.analysis.pictures.style import COLOURS, GREY, figure

PICTURE = ROOT / "docs" / "_static" / "speed.svg"
KINDS = {
    "full": ("full fine-tuning", COLOURS[5], "s"),
    "lora": ("LoRA", COLOURS[0], "o"),
    "dsee": ("DSEE, zeros among the weights", COLOURS[1], "D"),
    "cut": ("cut to fewer FLOPs", COLOURS[2], "^"),
}
"""The start of the name of a method -> label, colour and marker."""


SAME, STEP = 0.03, 0.075
"""Speeds that differ by no more than `SAME` stand side by side, `STEP` apart."""


def draw(rows: list[dict[str, Any]]) -> Any:
    """Return the figure of measured speed, one panel for each model and task.

    Args:
      rows: those of ``methods.json``; the rows without a measured speed, and ablations, are left out.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["throughput_ratio"] and row["method"] in methods.METHODS:
            panels.setdefault(row["title"], []).append(row)
    picture, handles = figure(4.2 * len(panels), 3.4), {}
    grid = picture.subplots(1, len(panels), squeeze=False, sharex=True)
    for axes, (title, points) in zip(grid[0], panels.items(), strict=True):
        for row, place in zip(points, side_by_side([each["throughput_ratio"] for each in points]), strict=True):
            kind, _, amount = row["method"].partition("_")
            label, colour, mark = KINDS[kind]
            seeds = row["scores"].values()
            axes.scatter([place] * len(seeds), [*seeds], color=colour, s=7, alpha=0.45, linewidths=0, zorder=2)
            handles[label] = axes.scatter(place, row["mean"], color=colour, marker=mark, s=34, zorder=3)
            axes.annotate(
                f"{amount} %" if amount else "",
                (place, row["mean"]),
                (5, 3),
                textcoords="offset points",
                fontsize=7,
                color="#555555",
            )
        axes.set(title=title, xlabel="measured throughput, pretrained model = 1", ylabel=f"{points[0]['score']} x 100")
        axes.margins(0.12)
        axes.grid(color=GREY, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    picture.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return picture


def side_by_side(speeds: Sequence[float]) -> list[float]:
    """Return the place of each speed on the axis: the speed itself, or beside the others within `SAME`, around their mean."""
    places = []
    for number, speed in enumerate(speeds):
        near = [other for other, value in enumerate(speeds) if abs(value - speed) <= SAME]
        middle = statistics.fmean(speeds[other] for other in near)
        places.append(middle + STEP * (near.index(number) - (len(near) - 1) / 2))
    return places


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = json.loads((RESULTS / "methods.json").read_text())["rows"]
    # Equal results give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "scores", "svg.fonttype": "none", "font.size": 9}):
        draw(rows).savefig(PICTURE, metadata={"Date": None}, facecolor="white")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
