"""Loss, learning rate and dev scores of a run by step."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsee_jax.analysis.pictures import style


def timeline(records: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[int, Mapping[str, Any]]], dict[str, int]]:
    """Return the records, each with its optimiser step counted from the start of the run, and the first step of each stage.

    A stage without training is placed at the last step of the stage before.
    """
    trained = {record["stage"] for record in records if "loss" in record}
    begin: dict[str, int] = {}
    placed, end = [], 0
    for record in records:
        at = begin.setdefault(record["stage"], end) + (record["step"] if record["stage"] in trained else 0)
        placed.append((at, record))
        end = max(end, at)
    return placed, begin


def draw(records: Sequence[Mapping[str, Any]]) -> Any:
    """Draw loss, learning rate and dev scores by step, with the stages marked."""
    placed, begin = timeline(records)
    losses = [(at, record) for at, record in placed if "loss" in record]
    if not losses:
        return None
    figure = style.figure(8, 6.5)
    axes = figure.subplots(3, 1, sharex=True)
    for axis, key, label in zip(axes, ("loss", "learning_rate"), ("training loss", "learning rate"), strict=False):
        for stage in begin:
            points = [(at, record[key]) for at, record in losses if record["stage"] == stage]
            axis.plot([at for at, _ in points], [value for _, value in points], ".-", markersize=3, color=style.BLUE)
        axis.set_ylabel(label)
    scored = [(at, record["metrics"]) for at, record in placed if "metrics" in record]
    keys = dict.fromkeys(key for _, metrics in scored for key in metrics)
    names = [name for name in keys if not name.startswith("loss")]
    for name, colour in zip(names, style.COLOURS, strict=False):
        points = [(at, metrics[name]) for at, metrics in scored if name in metrics]
        axes[2].plot(*zip(*points, strict=True), "o-", markersize=4, color=colour, label=name)
    axes[2].set(ylabel="dev score", xlabel="optimiser step")
    if names:
        axes[2].legend()
    for at in sorted({*begin.values()}):
        stages = ", ".join(stage for stage, first in begin.items() if first == at)
        axes[0].annotate(stages, (at, 1.02), xycoords=("data", "axes fraction"), fontsize=8)
        for axis in axes:
            axis.axvline(at, color="grey", linestyle=":", linewidth=1)
    return figure
