"""The layout of a param in a tensor of a file: unchanged, transposed, or as one of several parts of the tensor.

A file may store the kernels of query, key and value in one tensor. In this library each kernel has its own path, for rules,
updates and pruning; the names of an architecture then map several paths to one tensor, each with its part. Parts have equal
widths and share the last axis of our param, the outputs. Along this axis a tensor is ``(turns, parts, block)``. Adjacent parts
are one turn with blocks as wide as a part; with blocks of the head size, the parts alternate head by head.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

LAYER = r"(?:^|[./_])(?:layers?|h|(?:res)?blocks?)[./_](?P<unit>\d+)(?=[./])"
"""The number of a transformer layer, in Hugging Face's names and in the paths of this library."""

QUANTISED = ("quantization_config", "quantization", "compression_config")
"""The fields of a ``config.json`` whose model has weights that are stored as integers with scales."""


def split_layer(name: str) -> tuple[str, int, str] | None:
    """Return a name as (text before the layer number, layer number, text after); None outside the layers.

    Layers with one text before their number are one tower: an encoder, a decoder, a stage.
    """
    match = re.search(LAYER, name)
    if match is None or len(match["unit"]) > 6 or match["unit"] != str(int(match["unit"])):
        return None
    return name[: match.start("unit")], int(match["unit"]), name[match.end("unit") :]


def layers_by_name(names: Iterable[str]) -> dict[str, str | None]:
    """Return ``{name: layer}``: the layer's number, after the text before it if there are several towers; None outside."""
    positions = {name: split_layer(name) for name in names}
    towers = {position[0] for position in positions.values() if position}
    return {
        name: position and f"{position[0] if len(towers) > 1 else ''}{position[1]}"
        for name, position in positions.items()
    }


class Layout(NamedTuple):
    """The layout of one param in one tensor."""

    transposed: bool = False
    """The file has (out, in), ours is (in, out)."""
    part: int = 0
    """The index of this param among the parts of the tensor, from 0."""
    parts: int = 1
    """The number of params that share the tensor."""
    block: str | int = 0
    """Outputs of a part per turn: a number, or the config attribute that holds the number. 0: all outputs, in one turn."""


PLAIN = Layout()
KERNEL = Layout(transposed=True)


def resolved(layout: Layout, config: Any) -> Layout:
    """Return the layout with ``block`` as a number."""
    return layout._replace(block=getattr(config, layout.block)) if isinstance(layout.block, str) else layout


def stored_shape(layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the file's tensor for a param of ``shape`` (..., out)."""
    *rest, out = shape
    shared = (*rest, out * layout.parts)
    return shared[::-1] if layout.transposed else shared


def to_ours(layout: Layout, array: np.ndarray) -> np.ndarray:
    """Return the param (..., out) in a tensor of a file, at a resolved layout; a view where possible."""
    array = array.T if layout.transposed else array
    return array if layout.parts == 1 else _turns(layout, array)[..., layout.part, :].reshape(*array.shape[:-1], -1)


def to_hf(layouts: Sequence[Layout], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the tensor of the file from all its parts, each (..., out), in any order: the inverse of `to_ours`."""
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
    """Return the indices of the outputs of a param on the shared axis of a tensor, which has ``size`` entries: int64 (out,).

    The result is empty if ``size`` is not a multiple of a turn: the tensor then belongs to another model.
    """
    if size % (layout.parts * (int(layout.block) or 1)):
        return np.zeros(0, np.int64)
    return to_ours(layout._replace(transposed=False), np.arange(size))


def _turns(layout: Layout, array: np.ndarray) -> np.ndarray:
    """Return the view (..., turns, parts, block) of an array (..., parts * out)."""
    block = int(layout.block) or array.shape[-1] // layout.parts
    return array.reshape(*array.shape[:-1], -1, layout.parts, block)
