"""The common style of the pictures: colours, figures, ticks, the order of layers."""

import math
from collections.abc import Mapping
from typing import Any

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#DDDDDD"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""The palette of Okabe and Ito, which colour-blind readers can distinguish."""
SCALE = "cividis"
"""The colours of a quantity, from dark blue to yellow, also for colour-blind readers."""


def figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def names(layers: Mapping[str, Any]) -> list[str]:
    """Return the names of layers in numeric order: layer_2 before layer_10."""
    return sorted(layers, key=lambda name: (len(name), name))


def ticks(axis: Any, count: int, room: int = 26) -> None:
    """Label ``count`` places along an axis with their numbers, ``room`` labels at most."""
    step = math.ceil(count / room)
    axis.set_ticks(range(0, count, step), [str(number) for number in range(0, count, step)])
