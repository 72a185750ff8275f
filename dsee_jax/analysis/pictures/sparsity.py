"""The fraction of zeros in every kernel."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.analysis.pictures import style
from dsee_jax.ckpt import tensors


class Zeros(NamedTuple):
    """The number of zero entries of each kernel."""

    kernels: list[str]
    zeros: np.ndarray  # (kernels, layers); NaN if the layer has no such kernel
    entries: np.ndarray  # (kernels, layers)


def zeros(folder: Path) -> Zeros:
    """Count the zeros of the matrices in the layers of a Hugging Face folder, with one matrix in memory at a time."""
    kernels: dict[str, dict[int, tuple[int, int]]] = {}
    for name, stored in tensors.index(folder).items():
        place = re.fullmatch(r"(?:\D*\.)?(\d+)\.(.+)\.weight", name)
        if place and len(stored.shape) == 2:
            matrix = tensors.read(stored)
            counts = (int(np.count_nonzero(matrix == 0)), matrix.size)
            kernels.setdefault(place[2], {})[int(place[1])] = counts
    layers = 1 + max((number for counts in kernels.values() for number in counts), default=-1)
    table = np.full((2, len(kernels), layers), np.nan)
    for row, counts in enumerate(kernels.values()):
        for layer, pair in counts.items():
            table[:, row, layer] = pair
    return Zeros(list(kernels), *table)


def draw(counts: Zeros) -> Any:
    """Draw the fraction of zeros in every kernel, layers x kernels; None without any zero."""
    if not np.nansum(counts.zeros):
        return None
    shares = 100 * counts.zeros / counts.entries
    kernels, layers = shares.shape
    figure = style.figure(3.2 + 0.38 * layers, 1.5 + 0.34 * kernels)
    axis = figure.subplots()
    image = axis.imshow(shares, aspect="auto", cmap=style.SCALE, vmin=0, vmax=100, interpolation="nearest")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            colour = "white" if share < 55 else "black"
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    total = np.nansum(counts.zeros) / np.nansum(counts.entries)
    axis.set(title=f"weights that are zero: {total:.1%} of these kernels", xlabel="layer")
    axis.set_yticks(range(kernels), counts.kernels)
    style.ticks(axis.xaxis, layers)
    figure.colorbar(image, ax=axis, label="% zero")
    return figure
