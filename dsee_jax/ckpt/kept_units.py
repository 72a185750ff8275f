"""The kept units of a structurally pruned model, in ``kept.safetensors`` beside its arrays. True = kept.

Two models of equal shapes may hold different units; their arrays are then unrelated.
"""

import re
from pathlib import Path

import numpy as np

from dsee_jax import tree
from dsee_jax.ckpt import packed_masks
from dsee_jax.ckpt.folders import KEPT
from dsee_jax.errors import InputError
from dsee_jax.typing import Masks

_PATH = re.compile(r"(heads|neurons)/layer_\d+|layers|hidden")


def read(folder: Path) -> Masks:
    """Return the kept units of a folder, see `dsee_jax.prune.units`; empty if no unit was pruned.

    Raises:
      InputError: the file is damaged, or holds units that this version does not know.
    """
    if not (folder / KEPT).exists():
        return {}
    kept = packed_masks.load(folder / KEPT)
    for path, flags in tree.flatten(kept).items():
        if not _PATH.fullmatch(path) or flags.ndim != 1:
            raise InputError(
                f"{folder / KEPT}: {path!r} {flags.shape} are no units of a model; update dsee_jax to read it"
            )
    return kept


def write(folder: Path, kept: Masks | None) -> None:
    """Write the kept units into a folder; write no file if no unit was pruned."""
    if kept:
        packed_masks.save(folder / KEPT, kept)


def difference(a: Masks, b: Masks) -> str | None:
    """Return the first difference of the kept units of two models, as ``the heads of layer 3``; None if they are equal.

    An absent kind or layer keeps all units.
    """
    flat = [tree.flatten(kept) for kept in (a, b)]

    def order(path: str) -> tuple[int, str, str]:
        """Units of the whole model first; layers as numbers: layer_2 before layer_10."""
        kind, _, name = path.partition("/")
        return len(name), name, kind

    for path in sorted({*flat[0], *flat[1]}, key=order):
        left, right = (kept.get(path) for kept in flat)
        ones = np.ones_like(right if left is None else left)
        if not np.array_equal(ones if left is None else left, ones if right is None else right):
            kind, _, name = path.partition("/")
            units = "hidden dimensions" if kind == "hidden" else kind
            return f"the {units} of {name.replace('_', ' ') or 'the model'}"
    return None
