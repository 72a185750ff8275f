"""What a merge took from whom: a heat map and a table of coefficients and relative changes, units x models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsee_jax.aliases import Array
from merge.compare import aligned

ROW, TALLEST = 0.22, 48.0
"""Inches: of one unit in the picture, and of the whole picture at most."""


def heatmap(path: Path, units: Sequence[str], models: Sequence[str], coefficients: Array, relative: Array) -> str:
    """Draw two panels into the PNG file ``path``; return the line that says so, or why nothing was drawn.

    Without matplotlib (extra ``plot``) nothing is drawn: a merge is not worth less for it.

    Args:
      path: the file to make.
      units: from the top down.
      models: from left to right.
      coefficients: (units, models), the share of each model; the colours diverge from an equal share.
      relative: (units, models), the norm of the change over the norm of the base, from 0 up; NaN or infinite
        where there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "heat map  not drawn: pip install 'dsee-jax[plot]'"
    shares, changes = (np.asarray(values, np.float64) for values in (coefficients, relative))
    changes = np.where(np.isfinite(changes), changes, np.nan)
    names = _short(models)
    height = min(max(ROW * len(units), 1.0), TALLEST)
    figure = Figure(figsize=(3.4 + 1.5 * len(models), height + 1.6), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2, sharey=True)
    equal = 1 / len(models)
    span = max(float(np.max(np.abs(shares - equal))), 1e-3)
    panels: list[tuple[Any, str, np.ndarray, str, dict[str, Any]]] = [
        (left, "coefficient", shares, ".2f", {"cmap": "RdBu_r", "vmin": equal - span, "vmax": equal + span}),
        (right, "relative change", changes, ".1%", {"cmap": "viridis", "vmin": 0}),
    ]
    for axis, title, values, form, colours in panels:
        image = axis.imshow(values, aspect="auto", interpolation="nearest", **colours)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axis.tick_params(length=0)
        bar = figure.colorbar(image, ax=axis, orientation="horizontal", aspect=30, pad=0.01)
        bar.ax.tick_params(labelsize=7)
        finite = values[np.isfinite(values)]
        if len(set(finite)) > 1:  # only the colours of values that there are
            bar.ax.set_xlim(finite.min(), finite.max())
        bar.ax.xaxis.set_major_formatter(lambda value, _, form=form: format(value, form))
        _write(axis, image, values, form, height)
    # As many names as there is room for.
    step = int(np.ceil(len(units) * 0.14 / height))
    left.set_yticks(range(0, len(units), step), list(units)[::step], fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    return f"heat map  {path}"


def _write(axis: Any, image: Any, values: np.ndarray, form: str, height: float) -> None:
    """Write each value into its cell, dark on light or light on dark, where there is room."""
    if len(values) * 0.16 > height or values.shape[1] > 12:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axis.text(
                column,
                row,
                format(value, form),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if dark else "black",
            )


def table(units: Sequence[str], models: Sequence[str], coefficients: Array, relative: Array) -> str:
    """Return the same as text, a line a unit: the coefficients of all models, then their relative changes."""
    names = _short(models)
    header = ["unit", *(f"share {name}" for name in names), *(f"change {name}" for name in names)]
    rows = [
        [
            unit,
            *(f"{share:.4f}" for share in shares),
            *("-" if np.isnan(change) else f"{change:.2%}" for change in changes),
        ]
        for unit, shares, changes in zip(units, np.asarray(coefficients), np.asarray(relative), strict=True)
    ]
    return aligned([header, *rows])


def _short(models: Sequence[str], most: int = 24) -> list[str]:
    """Return the last parts of paths, as many of them as tell the models apart, cut in front where they are long."""
    parts = [str(model).strip("/").split("/") for model in models]
    count = next(
        (n for n in range(1, max(map(len, parts))) if len({tuple(p[-n:]) for p in parts}) == len(parts)),
        max(map(len, parts)),
    )
    names = ["/".join(part[-count:]) for part in parts]
    return [name if len(name) <= most else f"...{name[3 - most :]}" for name in names]
