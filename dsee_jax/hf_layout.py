"""How a param of ours stands in a tensor of a file: as it is, transposed, or as one of several that share the tensor.

A file may keep the kernels of query, key and value in one tensor. Here each has a path of its own, so that rules, updates and
cuts name it; `HF_NAMES` then gives several paths one name, each with its part. Parts have equal widths and share the last axis
of ours, the outputs. Along it a tensor is ``(turns, parts, block)``: side by side is one turn, of blocks as wide as a part;
with blocks of a head's size the parts take turns head by head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
    """One param in one tensor."""

    transposed: bool = False
    """The file has (out, in), ours is (in, out)."""
    part: int = 0
    """Which of the tensor's parts this param is, from 0."""
    parts: int = 1
    block: str | int = 0
    """Outputs of a part at one turn: a number, or the attribute of the config that says it. 0: all, side by side."""


PLAIN = Layout()
KERNEL = Layout(transposed=True)


def resolved(layout: Layout, config: Any) -> Layout:
    """Return the layout with ``block`` as a number."""
    return layout._replace(block=getattr(config, layout.block)) if isinstance(layout.block, str) else layout


def stored_shape(layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the file's tensor for a param of ``shape`` (..., out)."""
    *rest, out = shape
    whole = (*rest, out * layout.parts)
    return whole[::-1] if layout.transposed else whole


def to_ours(layout: Layout, array: np.ndarray) -> np.ndarray:
    """Return the param (..., out) that a file's tensor holds at a resolved layout; a view where there is one."""
    array = array.T if layout.transposed else array
    return array if layout.parts == 1 else _turns(layout, array)[..., layout.part, :].reshape(*array.shape[:-1], -1)


def to_hf(layouts: Sequence[Layout], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the file's tensor of all its parts, each (..., out), in any order: the inverse of `to_ours`."""
    first = layouts[0]
    if first.parts == 1:
        (array,) = arrays
    else:
        array = np.empty((*arrays[0].shape[:-1], arrays[0].shape[-1] * first.parts), arrays[0].dtype)
        for layout, part in zip(layouts, arrays, strict=True):
            view = _turns(layout, array)[..., layout.part, :]
            view[...] = part.reshape(view.shape)
    return array.T if first.transposed else array


def outputs(layout: Layout, size: int) -> np.ndarray:
    """Return where on the shared axis of a tensor, of ``size`` entries, the outputs of a param stand: int64 (out,).

    None stand there when that many entries are no whole number of turns: the tensor is of another model.
    """
    if size % (layout.parts * (int(layout.block) or 1)):
        return np.zeros(0, np.int64)
    return to_ours(layout._replace(transposed=False), np.arange(size))


def _turns(layout: Layout, array: np.ndarray) -> np.ndarray:
    """Return the view (..., turns, parts, block) of an array (..., parts * out)."""
    block = int(layout.block) or array.shape[-1] // layout.parts
    return array.reshape(*array.shape[:-1], -1, layout.parts, block)
