"""Charts as inline SVG: lines by step or layer, kept units of each layer, and the place of a support in its kernel.

A chart is as wide as its column; 360 units are about 360 pixels, on a phone too, so that its labels stay legible. A tooltip is
the ``title`` of a mark.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dsee_jax.analysis.page.markup import Markup, tag

DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 4", "12 4")
"""The lines of the runs differ in their dashes too: colour alone is not for every reader."""

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 18, 34

POINTS = 150
"""The most points of a line; of more, each point is the mean of its neighbours."""

BINS = 24
"""The rows and columns into which a kernel is divided to show its support."""

LEVELS = 4
"""The strengths of a cell, by its number of entries."""

BLOCKS, SINGLE = 48, 64
"""The most units of a layer that are drawn one by one; the blocks of units in a layer with more."""


class Line(NamedTuple):
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]  # (x, y), by x
    run: int  # its colour and dashes


def run_class(run: int) -> str:
    """Return the class of an element in the colour of a run."""
    return f"run-{run % len(DASHES)}"


def key(run: int) -> Markup:
    """Return the sample of the line of a run, for a legend."""
    line = tag("line", x1=1, x2=35, y1=6, y2=6, class_="curve", stroke_dasharray=DASHES[run % len(DASHES)])
    return tag("svg", line, viewBox="0 0 36 12", width=36, height=12, class_=run_class(run), aria_hidden="true")


def lines(
    title: str, series: Sequence[Line], *, x_label: str, marks: Mapping[str, float] | None = None, zero: bool = False
) -> Markup:
    """Return a chart with one line per series, as a figure.

    Args:
      title: above the chart.
      series: the lines; points that are not finite are left out.
      x_label: below the axis.
      marks: vertical lines by label, such as the starts of stages.
      zero: whether the vertical axis starts at 0.
    """
    series = [line._replace(points=_finite(line.points)) for line in series]
    xs = [x for line in series for x, _ in line.points] + list((marks or {}).values())
    ys = [y for line in series for _, y in line.points]
    if not ys:
        return Markup("")
    x_ticks, y_ticks = _ticks(min(0.0, *xs), max(xs), 5), _ticks(0.0 if zero else min(ys), max(ys), 4)
    x_range, y_range = (min(0.0, *xs), max(xs)), (min(y_ticks[0], *ys), max(y_ticks[-1], *ys))

    def x_of(x: float) -> float:
        return _LEFT + _share(x, *x_range) * (WIDTH - _LEFT - _RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - _BOTTOM - _share(y, *y_range) * (HEIGHT - _TOP - _BOTTOM)

    bottom = HEIGHT - _BOTTOM
    parts: list[Markup] = []
    for tick in y_ticks:
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_at(y_of(tick)), y2=_at(y_of(tick)), class_="grid"))
        parts.append(tag("text", number(tick), x=_LEFT - 6, y=_at(y_of(tick) + 4), text_anchor="end"))
    parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"))
    for tick in (tick for tick in x_ticks if x_range[0] <= tick <= x_range[1]):
        parts.append(tag("text", number(tick), x=_at(x_of(tick)), y=bottom + 14, text_anchor="middle"))
    parts.append(tag("text", x_label, x=(_LEFT + WIDTH - _RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    taken = -math.inf
    for label, x in (marks or {}).items():
        parts.append(tag("line", x1=_at(x_of(x)), x2=_at(x_of(x)), y1=_TOP, y2=bottom, class_="stage"))
        width = 6.2 * len(label)
        anchor, start = ("start", x_of(x)) if x_of(x) + width < WIDTH else ("end", x_of(x) - width)
        if start > taken:  # a label that would cover another is left out; the table names the stage
            parts.append(tag("text", label, x=_at(x_of(x)), y=_TOP - 6, text_anchor=anchor))
            taken = start + width
    for line in series:
        points = [(x_of(x), y_of(y), x, y) for x, y in _thinned(line.points)]
        d = "M" + "L".join(f"{_at(left)} {_at(top)}" for left, top, _, _ in points)
        drawn = [tag("path", d=d, class_="curve", stroke_dasharray=DASHES[line.run % len(DASHES)])] if points else []
        for left, top, x, y in points:
            shown = tag("title", f"{line.label}: {number(y)} at {x_label} {number(x)}")
            drawn.append(tag("circle", shown, cx=_at(left), cy=_at(top), r=2.2, class_="point"))
        parts.append(tag("g", *drawn, class_=run_class(line.run)))
    return figure(title, _svg(f"{title} by {x_label}", *parts))


def figure(caption: str, *content: Markup) -> Markup:
    """Return a figure with its caption above."""
    return tag("figure", tag("figcaption", caption), *content)


def strip(caption: str, unit: str, layers: Mapping[str, np.ndarray]) -> Markup:
    """Return the kept units of every layer as a strip of cells; of many units, the share that is kept of each block.

    Args:
      caption: above the chart.
      unit: what a cell is, in the plural, such as heads.
      layers: (units,) of bools by layer, True = kept.
    """
    height, left = 14, 26
    bottom = height * len(layers) + 4
    parts: list[Markup] = []
    for row, (layer, kept) in enumerate(layers.items()):
        if row % math.ceil(len(layers) / 16) == 0:
            parts.append(tag("text", layer, x=left - 5, y=row * height + 11, text_anchor="end"))
        blocks = np.array_split(np.arange(len(kept)), len(kept) if len(kept) <= SINGLE else BLOCKS)
        wide = (WIDTH - left) / len(blocks)
        for column, block in enumerate(blocks):
            share = float(np.mean(kept[block]))
            where = {
                "x": _at(left + column * wide),
                "y": row * height + 1,
                "width": _at(wide - 1),
                "height": height - 2,
            }
            names = f"{unit} {block[0]} to {block[-1]}" if len(block) > 1 else f"{unit.removesuffix('s')} {block[0]}"
            shown = (
                f"layer {layer}, {names}: {share:.0%} kept"
                if len(block) > 1
                else (f"layer {layer}, {names}: {'kept' if share else 'pruned'}")
            )
            parts.append(tag("rect", **where, class_="track"))
            parts.append(tag("rect", tag("title", shown), **where, class_="cell", fill_opacity=f"{share:.2f}"))
    text = f"{caption}: {unit} kept in each of {len(layers)} layers"
    return figure(caption, _svg(text, *parts, height=bottom))


def support(caption: str, coordinates: np.ndarray, shape: tuple[int, int], run: int) -> Markup:
    """Return where a support lies in its kernel: cells by their number of entries, and the density of rows and columns.

    Args:
      caption: above the chart.
      coordinates: (nonzeros, 2), row and column.
      shape: of the kernel.
      run: the colour.
    """
    counts, *_ = np.histogram2d(coordinates[:, 0], coordinates[:, 1], BINS, ((0, shape[0]), (0, shape[1])))
    side, margin = 96, 24
    cell = side / BINS
    level = np.ceil(LEVELS * counts / max(counts.max(), 1)).astype(int)
    parts = [tag("rect", x=0, y=margin, width=side, height=side, class_="track")]
    for strength in range(1, LEVELS + 1):
        boxes = [(column * cell, margin + row * cell, cell, cell) for row, column in np.argwhere(level == strength)]
        parts.append(tag("path", d=_boxes(boxes), class_="dots", fill_opacity=f"{strength / LEVELS:.2f}"))
    for kind, axis, size in (("inputs", 0, shape[0]), ("outputs", 1, shape[1])):
        along = counts.sum(1 - axis)
        bars = [(margin - 4) * count / max(along.max(), 1) for count in along]
        if kind == "inputs":
            boxes = [(side + 2, margin + place * cell, bar, cell) for place, bar in enumerate(bars)]
        else:
            boxes = [(place * cell, margin - 2 - bar, cell, bar) for place, bar in enumerate(bars)]
        most = int(np.argmax(along))
        edges = f"{kind} {size * most // BINS} to {size * (most + 1) // BINS}"
        parts.append(
            tag("path", tag("title", f"most entries, {along[most]:.0f}: {edges}"), d=_boxes(boxes), class_="dots")
        )
    drawing = _svg(f"{caption}: {len(coordinates)} entries", *parts, width=side + margin, height=side + margin)
    return tag("figure", tag("figcaption", caption), drawing, class_=run_class(run))


def _boxes(boxes: Sequence[tuple[float, float, float, float]]) -> str:
    """Return the path of boxes (x, y, width, height), without those of no size."""
    return "".join(f"M{_at(x)} {_at(y)}h{_at(w)}v{_at(h)}h-{_at(w)}z" for x, y, w, h in boxes if w > 0 and h > 0)


def number(value: float) -> str:
    """Return a number as short text: 12,345 or 0.01234."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.4g}"


def _svg(label: str, *parts: Markup, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def _at(place: float) -> str:
    return f"{place:.1f}".removesuffix(".0")


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, or the means of neighbouring points where there are many."""
    if len(points) <= POINTS:
        return list(points)
    return [(float(x), float(y)) for x, y in (np.mean(part, 0) for part in np.array_split(np.array(points), POINTS))]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers that cover [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]
