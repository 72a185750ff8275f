"""The cut that a folder is of: which heads and neurons of the first model its arrays hold, in ``kept.safetensors``.

Two models of equal shapes may hold different units; their arrays then mean nothing to one another.
"""

from pathlib import Path

import numpy as np

from dsee_jax.ckpt import packed_masks
from dsee_jax.typing import Masks

KEPT = "kept.safetensors"
"""Beside the weights of a model that was cut, or of an adapter that was tuned on one."""


def read(folder: Path) -> Masks:
    """Return the units that a folder's arrays are made of, `dsee_jax.prune.units`; none where nothing was cut."""
    return packed_masks.load(folder / KEPT) if (folder / KEPT).exists() else {}


def write(folder: Path, kept: Masks | None) -> None:
    """Write the units into a folder; nothing where nothing was cut."""
    if kept:
        packed_masks.save(folder / KEPT, kept)


def difference(a: Masks, b: Masks) -> str | None:
    """Return where two cuts of one model first differ, as ``the heads of layer 3``; None where they are the same.

    A kind or a layer that is absent is whole.
    """
    layers = {name for cut in (a, b) for found in cut.values() for name in found}
    # As numbers: layer_2 before layer_10.
    for name in sorted(layers, key=lambda name: (len(name), name)):
        for kind in sorted({*a, *b}):
            left, right = (cut.get(kind, {}).get(name) for cut in (a, b))
            ones = np.ones_like(right if left is None else left)
            if not np.array_equal(ones if left is None else left, ones if right is None else right):
                return f"the {kind} of {name.replace('_', ' ')}"
    return None
