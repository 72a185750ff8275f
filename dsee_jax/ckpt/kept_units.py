"""The kept heads and neurons of a structurally pruned model, in ``kept.safetensors`` beside its arrays. True = kept.

Two models of equal shapes may hold different units; their arrays are then unrelated.
"""

from pathlib import Path

import numpy as np

from dsee_jax.ckpt import packed_masks
from dsee_jax.ckpt.folders import KEPT
from dsee_jax.typing import Masks


def read(folder: Path) -> Masks:
    """Return the kept units of a folder, see `dsee_jax.prune.units`; empty if no unit was pruned."""
    return packed_masks.load(folder / KEPT) if (folder / KEPT).exists() else {}


def write(folder: Path, kept: Masks | None) -> None:
    """Write the kept units into a folder; write no file if no unit was pruned."""
    if kept:
        packed_masks.save(folder / KEPT, kept)


def difference(a: Masks, b: Masks) -> str | None:
    """Return the first difference of the kept units of two models, as ``the heads of layer 3``; None if they are equal.

    An absent kind or layer keeps all units.
    """
    layers = {name for kept in (a, b) for masks in kept.values() for name in masks}
    # As numbers: layer_2 before layer_10.
    for name in sorted(layers, key=lambda name: (len(name), name)):
        for kind in sorted({*a, *b}):
            left, right = (kept.get(kind, {}).get(name) for kept in (a, b))
            ones = np.ones_like(right if left is None else left)
            if not np.array_equal(ones if left is None else left, ones if right is None else right):
                return f"the {kind} of {name.replace('_', ' ')}"
    return None
