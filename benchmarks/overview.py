"""The picture of the README and of the documentation: score against measured speed.

    pip install '.[plot]'
    python -m benchmarks.overview

Draws ``docs/_static/speed.svg`` of ``benchmarks/results/methods.json``.
"""

import json
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
    rows = json.loads((RESULTS / "methods.json").read_text())["rows"]
    # Equal results give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "scores", "svg.fonttype": "none", "font.size": 9}):
        draw(rows).savefig(PICTURE, metadata={"Date": None}, facecolor="white")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
