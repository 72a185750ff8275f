"""The share of zeros of every kernel."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.analysis.pictures import style
from dsee_jax.ckpt import tensors


class Zeros(NamedTuple):
    """How many entries of each kernel are exactly 0."""

    kernels: list[str]
    zeros: np.ndarray  # (kernels, layers); NaN where a layer has no such kernel
    entries: np.ndarray  # (kernels, layers)


def zeros(folder: Path) -> Zeros:
    """Count the zeros of the matrices that every layer of a Hugging Face folder has, one matrix in memory at a time."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for name, stored in tensors.index(folder).items():
        place = re.fullmatch(r"(?:\D*\.)?(\d+)\.(.+)\.weight", name)
        if place and len(stored.shape) == 2:
            matrix = tensors.read(stored)
            counts = (int(np.count_nonzero(matrix == 0)), matrix.size)
            found.setdefault(place[2], {})[int(place[1])] = counts
    layers = 1 + max((number for counts in found.values() for number in counts), default=-1)
    table = np.full((2, len(found), layers), np.nan)
    for row, counts in enumerate(found.values()):
        for layer, pair in counts.items():
            table[:, row, layer] = pair
    return Zeros(list(found), *table)


def draw(found: Zeros) -> Any:
    """Draw the share of zeros of every kernel, layers x kernels."""
    if not np.nansum(found.zeros):
        return None
    shares = 100 * found.zeros / found.entries
    kernels, layers = shares.shape
    figure = style.figure(3.2 + 0.38 * layers, 1.5 + 0.34 * kernels)
    axis = figure.subplots()
    image = axis.imshow(shares, aspect="auto", cmap=style.SCALE, vmin=0, vmax=100, interpolation="nearest")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            colour = "white" if share < 55 else "black"
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    total = np.nansum(found.zeros) / np.nansum(found.entries)
    axis.set(title=f"weights that are zero: {total:.1%} of these kernels", xlabel="layer")
    axis.set_yticks(range(kernels), found.kernels)
    style.ticks(axis.xaxis, layers)
    figure.colorbar(image, ax=axis, label="% zero")
    return figure
