"""Each model's share in a merge: a heat map and a table of coefficients and relative changes, groups x models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsee_jax.runtime import console
from dsee_jax.typing import Array
from merge.compare import aligned

PICTURE = "merge_coefficients.png"
"""The file of the heat map in the folder of a merged model."""

NOT_DRAWN = "not drawn: pip install 'dsee-jax[plot]'"
"""The reason for a missing picture."""

ROW, TALLEST = 26, 5760
"""Heights in pixels: of one group, and the maximum of all groups together."""

_MARGIN, _LINE, _COLUMN, _TEXT = 10, 20, 80, 12
_LONGEST, _LONGEST_UNIT = 24, 80  # characters of a name, and of a unit in the table
_DIVERGING = ((5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31))
_RISING = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_NONE = (224, 224, 224)


def heatmap(path: Path, units: Sequence[str], models: Sequence[str], coefficients: Array, relative: Array) -> bool:
    """Draw two panels into the PNG file ``path``; return whether it is drawn: without Pillow (extra ``plot``) it is not.

    Args:
      path: the file to write.
      units: the names of the groups, from the top down.
      models: from left to right.
      coefficients: (groups, models), the share of each model; the colours diverge from an equal share.
      relative: (groups, models), the norm of the change over the norm of the base, at least 0; NaN or infinite where
        undefined.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        return False
    font, names = ImageFont.load_default(_TEXT), _short(models)
    units = [_fitted(unit) for unit in units]
    labels = round(max(font.getlength(unit) for unit in units)) + _MARGIN
    column = max(_COLUMN, round(max(font.getlength(name) for name in names)) + _MARGIN)
    width, height = column * len(models), min(ROW * len(units), TALLEST)
    size = (2 * _MARGIN + labels + 2 * width + _MARGIN, 2 * _MARGIN + 4 * _LINE + height)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)

    def write(x: float, y: float, text: str, anchor: str = "mm", colour: str = "black") -> None:
        draw.text((x, y), text, colour, font, anchor)

    top, row_height = _MARGIN + _LINE, height / len(units)
    below = top + height + _LINE
    for row in range(0, len(units), int(np.ceil(_TEXT / row_height))):  # only as many labels as fit
        write(labels + _MARGIN / 2, top + (row + 0.5) * row_height, units[row], "rm")
    shares = np.asarray(coefficients, np.float64)
    changes = np.where(np.isfinite(relative), relative, np.nan).astype(np.float64)
    span = max(float(np.max(np.abs(shares - 1 / len(models)))), 1e-3)
    panels: list[tuple[str, np.ndarray, str, Callable[[Any], np.ndarray]]] = [
        ("coefficient", shares, ".2f", lambda v: _colours((v - 1 / len(models)) / (2 * span) + 0.5, _DIVERGING)),
        ("relative change", changes, ".1%", lambda v: _colours(v / max(np.nanmax(changes, initial=0), 1e-30), _RISING)),
    ]
    for number, (title, values, spec, colours) in enumerate(panels):
        left = _MARGIN + labels + number * (width + _MARGIN)
        write(left + width / 2, _MARGIN + _LINE / 2, title)
        cells = colours(values)
        pixels = cells[np.arange(height) * len(units) // height].repeat(column, axis=1)
        image.paste(Image.fromarray(pixels), (left, top))
        for row, model in np.argwhere(np.isfinite(values)) if row_height > _TEXT else ():
            light = cells[row, model] @ (0.299, 0.587, 0.114) >= 128
            text, colour = format(values[row, model], spec), "black" if light else "white"
            write(left + (model + 0.5) * column, top + (row + 0.5) * row_height, text, colour=colour)
        for model, name in enumerate(names):
            write(left + (model + 0.5) * column, below - _LINE / 2, name)
        finite = values[np.isfinite(values)]
        if finite.size:
            scale = colours(np.linspace(finite.min(), finite.max(), width))
            image.paste(Image.fromarray(np.repeat(scale[None], _LINE // 2, 0)), (left, below + _LINE // 4))
            for x, value, anchor in ((left, finite.min(), "lm"), (left + width, finite.max(), "rm")):
                write(x, below + 1.5 * _LINE, format(value, spec), anchor)
    image.save(path)
    return True


def _colours(places: Any, anchors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return the colours (..., 3) uint8 at ``places`` (...) in [0, 1]: the first anchor at 0, the last at 1, grey for NaN."""
    places = np.asarray(places)
    along = np.linspace(0, 1, len(anchors))
    colours = np.stack([np.interp(places, along, channel) for channel in zip(*anchors, strict=True)], axis=-1)
    return np.where(np.isnan(places)[..., None], _NONE, colours).round().astype(np.uint8)


def table(units: Sequence[str], models: Sequence[str], coefficients: Array, relative: Array) -> str:
    """Return the heat map as text, one line per group: the coefficients of all models, then their relative changes."""
    names = _short(models)
    header = ["unit", *(f"share {name}" for name in names), *(f"change {name}" for name in names)]
    rows = [
        [
            _fitted(unit, _LONGEST_UNIT),
            *(f"{share:.4f}" for share in shares),
            *("-" if np.isnan(change) else f"{change:.2%}" for change in changes),
        ]
        for unit, shares, changes in zip(units, np.asarray(coefficients), np.asarray(relative), strict=True)
    ]
    return aligned([header, *rows])


def _short(models: Sequence[str]) -> list[str]:
    """Return the shortest distinct tails of the models' paths, each fitted to a column."""
    parts = [str(model).strip("/").split("/") for model in models]
    count = next(
        (n for n in range(1, max(map(len, parts))) if len({tuple(p[-n:]) for p in parts}) == len(parts)),
        max(map(len, parts)),
    )
    names = ["/".join(part[-count:]) for part in parts]
    return [_fitted(name) for name in names]


def _fitted(name: str, longest: int = _LONGEST) -> str:
    """Return a name on one line, shortened at the front to ``longest`` characters."""
    name = console.plain(name)
    return name if len(name) <= longest else f"...{name[3 - longest :]}"
