"""The kept layers, and the kept heads and neurons of every layer, of a structurally pruned model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsee_jax.analysis.pictures import style
from dsee_jax.prune.layers import layer
from dsee_jax.typing import Masks

SINGLE, BLOCKS = 64, 128
"""The most units of a layer that are drawn one by one; the columns of the map for more units, each a block of units."""


def by_layer(units: Masks) -> dict[str, dict[str, np.ndarray]]:
    """Return the kept units of every kind by layer, all layers before any pruning in order.

    A layer is a unit of itself; a dropped layer keeps no heads and neurons, and a layer without flags all of them. Hidden
    dimensions are of no layer and left out.
    """
    kinds = {kind: part for kind, part in units.items() if isinstance(part, Mapping)}
    names, tables = style.names({name: None for layers in kinds.values() for name in layers}), {}
    gone: set[str] = set()
    if "layers" in units:
        names = [layer(number) for number in range(len(units["layers"]))]
        tables["layers"] = {name: np.array([stays]) for name, stays in zip(names, units["layers"], strict=True)}
        gone = {name for name, (stays,) in tables["layers"].items() if not stays}
    for kind, layers in kinds.items():
        full = np.ones(len(next(iter(layers.values()))), bool)
        tables[kind] = {name: ~full if name in gone else layers.get(name, full) for name in names}
    return tables


def draw(units: Masks) -> Any:
    """Draw the kept units of every layer; for many units, such as neurons, also the kept share of each layer.

    Hidden dimensions are not drawn: None if no others were pruned.

    Args:
      units: from `dsee_jax.prune.units`, True = kept, over all units before any pruning, the same number in every layer.
    """
    tables = {kind: np.stack([*layers.values()]).astype(float) for kind, layers in by_layer(units).items()}
    if not tables:
        return None
    rows = len(next(iter(tables.values())))
    widths = [width for table in tables.values() for width in ([1.5] if table.shape[1] <= SINGLE else [1.2, 3.6])]
    figure = style.figure(1.2 + 1.6 * sum(widths), max(2.2, 1.1 + 0.26 * rows))
    panels = iter(figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0])
    for kind, table in tables.items():
        title = f"{table.sum():,.0f} of {table.size:,} {kind} kept"
        if table.shape[1] <= SINGLE:
            _single(next(panels), table, title, kind.removesuffix("s"))
            continue
        _shares(next(panels), table, kind)
        _blocks(figure, next(panels), table, title, kind.removesuffix("s"))
    for axis in figure.axes:
        axis.tick_params(which="minor", length=0)
        axis.title.set_fontsize(10)
    figure.axes[0].set_ylabel("layer")
    style.ticks(figure.axes[0].yaxis, rows)
    return figure


def _single(axis: Any, table: np.ndarray, title: str, unit: str) -> None:
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([style.GREY, style.BLUE])
    axis.imshow(table, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    axis.set(title=f"{title} (blue)", xlabel=unit)
    for along, count in ((axis.set_xticks, table.shape[1]), (axis.set_yticks, table.shape[0])):
        along(np.arange(count - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    style.ticks(axis.xaxis, table.shape[1], 8)


def _shares(axis: Any, table: np.ndarray, kind: str) -> None:
    axis.barh(range(len(table)), 100 * table.mean(1), color=style.BLUE)
    axis.set(title=f"{kind} kept", xlabel="% of a layer", xlim=(0, 100))
    axis.grid(axis="x", color=style.GREY)
    axis.set_axisbelow(True)


def _blocks(figure: Any, axis: Any, table: np.ndarray, title: str, unit: str) -> None:
    blocks = np.array_split(table, min(BLOCKS, table.shape[1]), axis=1)
    shares = np.stack([100 * block.mean(1) for block in blocks], 1)
    where = (0, table.shape[1], len(table) - 0.5, -0.5)
    image = axis.imshow(
        shares, aspect="auto", cmap=style.SCALE, vmin=0, vmax=100, extent=where, interpolation="nearest"
    )
    axis.set(title=title, xlabel=f"{unit}, in blocks of {max(block.shape[1] for block in blocks)}")
    figure.colorbar(image, ax=axis, label="% of a block")
