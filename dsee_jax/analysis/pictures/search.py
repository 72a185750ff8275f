"""The search for a ticket: coefficients, changes of the mask, and the step at which the ticket is drawn."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsee_jax.analysis.pictures import style


def draw(records: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the learned coefficients, the change of the mask between checks, and the step at which the ticket is drawn.

    Args:
      records: from ``metrics.jsonl``. A record with ``coefficients`` is a check: ``coefficients`` has all coefficients of
        heads, and for neurons the quantiles 0, 1/4, 1/2, 3/4 and 1 of each layer; ``distance`` is the distance from the mask
        of the previous check, a fraction of the units, by kind; ``kept`` is the mask in hexadecimal
        (`dsee_jax.prune.earlybert.packed`).
    """
    checks = [record for record in records if "coefficients" in record]
    if not checks:
        return None
    steps = [check["step"] for check in checks]
    layers = checks[0].get("kept", {}).get("neurons", {})
    # For neurons the record has quantiles only; four units per hexadecimal digit is exact for multiples of 8.
    units = {
        "heads": sum(map(len, checks[0]["coefficients"].get("heads", {}).values())),
        "neurons": sum(4 * len(digits) for digits in layers.values()),
    }
    heights = [max(2.8, 0.012 * units["heads"]), 2.8, 2.8]
    figure = style.figure(8, 1.2 + sum(heights))
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    # Room for the last step, which would lie on the frame.
    bottom.set_xlim(0, 1.02 * steps[-1])
    for axis, kind, panel in ((top, "heads", _heads), (middle, "neurons", _neurons)):
        if layers := checks[0]["coefficients"].get(kind):
            panel(figure, axis, style.names(layers), steps, [check["coefficients"][kind] for check in checks])
    for kind, colour in (("heads", style.BLUE), ("neurons", style.ORANGE)):
        moved = [(check["step"], 100 * check["distance"][kind]) for check in checks if kind in check["distance"]]
        if moved:
            bottom.plot(
                *zip(*moved, strict=True), "o-", markersize=4, color=colour, label=f"{kind}: from the previous check"
            )
        if all(kind in check.get("kept", {}) for check in checks):
            away = [100 * distance(check["kept"][kind], checks[-1]["kept"][kind]) / units[kind] for check in checks]
            bottom.plot(steps, away, "s--", markersize=3, color=colour, label=f"{kind}: from the last check", alpha=0.8)
    bottom.set_title("change of the mask (Hamming distance)", fontsize=10)
    bottom.set(ylabel="% of the units", xlabel="step of the search")
    bottom.set_ylim(bottom=0)
    if any(record["stage"] == "draw" for record in records):
        for axis in (top, middle, bottom):
            axis.axvline(steps[-1], color="black", linestyle=":", label="ticket drawn" if axis is bottom else None)
    bottom.legend(fontsize=8)
    return figure


def _heads(figure: Any, axis: Any, names: list[str], steps: list[int], checks: list[dict[str, list[float]]]) -> None:
    """Draw one row per head, layer by layer; the colour of a check spans the steps since the previous check."""
    rows = np.array([[c for name in names for c in check[name]] for check in checks]).T
    ends = np.cumsum([len(checks[0][name]) for name in names])
    image = axis.pcolormesh([0, *steps], np.arange(len(rows) + 1), rows, cmap=style.SCALE)
    figure.colorbar(image, ax=axis, label="coefficient")
    for end in ends[:-1]:
        axis.axhline(end, color="white", linewidth=0.8)
    step = math.ceil(len(names) / 12)
    middles = ends - [len(checks[0][name]) / 2 for name in names]
    axis.set_yticks(middles[::step], [str(number) for number in range(0, len(names), step)])
    axis.invert_yaxis()
    axis.set_ylabel("layer (one line per head)")
    axis.set_title("coefficients of heads", fontsize=10)


def _neurons(figure: Any, axis: Any, names: list[str], steps: list[int], checks: list[dict[str, list[float]]]) -> None:
    """Draw the quantiles of every layer, with bold medians."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    colours = ScalarMappable(BoundaryNorm(np.arange(len(names) + 1) - 0.5, 256), style.SCALE)
    for name, colour in zip(names, colours.to_rgba(np.arange(len(names))), strict=True):
        quantiles = np.array([check[name] for check in checks]).T
        for line, values in enumerate(quantiles):
            width = 2 if 2 * line + 1 == len(quantiles) else 0.8
            axis.plot(steps, values, color=colour, linewidth=width)
    style.ticks(figure.colorbar(colours, ax=axis, label="layer").ax.yaxis, len(names), 12)
    axis.set_ylabel("coefficient")
    axis.set_title("coefficients of neurons by layer: median (bold), quartiles, smallest and largest", fontsize=10)


def distance(a: Mapping[str, str], b: Mapping[str, str]) -> int:
    """Return the number of units that differ between two masks in hexadecimal (`dsee_jax.prune.earlybert.packed`)."""
    return sum((int(a[name], 16) ^ int(b[name], 16)).bit_count() for name in a)
