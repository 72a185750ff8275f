"""Merge units: groups of tensors that share one coefficient.

A regular expression with a group ``unit`` is searched in each tensor's path or name, and the match names the tensor's group.
``layer`` and ``tensor`` are built in. A layer's group is its number; where a model has several towers, such as an encoder and
a decoder, the text before the number goes first. Tensors without a match (embeddings, final norm, head) are in no group.
"""

import re
import time
from collections.abc import Sequence

import regex

from dsee_jax import hf_layout
from dsee_jax.errors import InputError

SECONDS = 5.0
"""The time that a regular expression may take for all names of a model."""


def of(names: Sequence[str], unit: str) -> dict[str, str | None]:
    """Return ``{name: group}``, None for names in no group.

    Args:
      names: paths or names of tensors.
      unit: ``layer``, ``tensor``, or a regular expression with a group named ``unit``.

    Raises:
      InputError: ``unit`` is no regular expression, has no group ``unit``, matches no name, or takes longer than `SECONDS`.
    """
    if unit == "tensor":
        return {name: name for name in names}
    groups = hf_layout.layers_by_name(names) if unit == "layer" else _matched(names, unit)
    if not any(groups.values()):
        raise InputError(f"unit {unit!r} matches no tensor; the first is {next(iter(names), None)!r}")
    return groups


def _matched(names: Sequence[str], unit: str) -> dict[str, str | None]:
    try:
        pattern = regex.compile(unit)
    except regex.error as error:
        raise InputError(f"unit {unit!r} is neither layer, tensor nor a regular expression: {error}") from None
    if "unit" not in pattern.groupindex:
        raise InputError(f"unit {unit!r} names no group; write (?P<unit>...) around the part that names the unit")
    stop, groups = time.monotonic() + SECONDS, {}
    for name in names:
        try:
            match = pattern.search(name, timeout=max(stop - time.monotonic(), 1e-3))
        except TimeoutError:
            raise InputError(
                f"unit {unit!r} takes more than {SECONDS:g} s on {len(names)} names, such as {name!r}; simplify it: "
                "a repeated group that holds a repetition takes exponential time"
            ) from None
        groups[name] = match["unit"] if match else None
    return groups


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def depths(names: Sequence[str]) -> dict[str, float | None]:
    """Return ``{name: l / (L - 1)}``, the relative depth in [0, 1] of layer l of its tower's L; None outside the layers.

    Raises:
      InputError: no name is in a layer.
    """
    of(names, "layer")
    positions = {name: hf_layout.split_layer(name) for name in names}
    last: dict[str, int] = {}
    for position in positions.values():
        if position:
            last[position[0]] = max(last.get(position[0], 1), position[1])
    return {name: position and position[1] / last[position[0]] for name, position in positions.items()}
