"""The numbers of layers: a model without some of its layers has the others under new numbers.

Layers are the nodes ``layer_0``, ``layer_1`` ... of every tree of a model. A flag per layer, True = kept, describes a cut.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsee_jax.models.architecture import ModelConfig
from dsee_jax.typing import Array


def layer(number: int) -> str:
    """Return the name of a layer in the trees of a model."""
    return f"layer_{number}"


_NAME = re.compile(r"layer_\d+")


def depth(config: ModelConfig) -> int:
    """Return the number of layers of a model."""
    return len(config.widths["heads"])


def names(kept: Array) -> dict[str, str]:
    """Return ``{name of a layer that stays: its name after the cut}`` for the flags ``kept`` (layers,)."""
    return {layer(int(number)): layer(new) for new, number in enumerate(np.flatnonzero(kept))}


def renamed(key: str, kept: Array | None) -> str | None:
    """Return a key of a tree after the cut: None for a dropped layer, other keys as they are; ``kept`` None: no cut."""
    return key if kept is None or not _NAME.fullmatch(key) else names(kept).get(key)


def moved(path: str, kept: Array | None) -> str | None:
    """Return the path of an array after the cut; None within a dropped layer."""
    keys = [renamed(key, kept) for key in path.split("/")]
    return None if None in keys else "/".join(key for key in keys if key is not None)


def renumbered(units: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of units by kind and layer for the layers of ``units["layers"]``, under their names after that cut.

    The kinds of the whole model, ``layers`` and ``hidden``, are left out.
    """
    new = None if "layers" not in units else names(units["layers"])
    return {
        kind: {name if new is None else new[name]: part for name, part in layers.items() if new is None or name in new}
        for kind, layers in units.items()
        if isinstance(layers, Mapping)
    }
