"""Merge units: groups of tensors that share one coefficient.

A regular expression with a group ``unit`` is searched in each tensor's path or name, and the match names the tensor's group.
``layer`` and ``tensor`` are built in. Tensors without a match (embeddings, final norm, head) are in no group.
"""

import re
from collections.abc import Sequence

from dsee_jax.errors import InputError
from dsee_jax.hf_layout import LAYER


def of(names: Sequence[str], unit: str) -> dict[str, str | None]:
    """Return ``{name: group}``, None for names in no group.

    Args:
      names: paths or names of tensors.
      unit: ``layer``, ``tensor``, or a regular expression with a group named ``unit``.

    Raises:
      InputError: ``unit`` is no regular expression, has no group ``unit``, or matches no name.
    """
    if unit == "tensor":
        return {name: name for name in names}
    try:
        pattern = re.compile(LAYER if unit == "layer" else unit)
    except re.error as error:
        raise InputError(f"unit {unit!r} is neither layer, tensor nor a regular expression: {error}") from None
    if "unit" not in pattern.groupindex:
        raise InputError(f"unit {unit!r} names no group; write (?P<unit>...) around the part that names the unit")
    groups = {name: match["unit"] if (match := pattern.search(name)) else None for name in names}
    if not any(groups.values()):
        raise InputError(f"unit {unit!r} matches no tensor; the first is {next(iter(names), None)!r}")
    return groups


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def depths(names: Sequence[str]) -> dict[str, float | None]:
    """Return ``{name: l / (L - 1)}``, the relative depth in [0, 1] of layer l of L; None for tensors outside the layers."""
    numbers = {name: None if group is None else int(group) for name, group in of(names, "layer").items()}
    last = max(number for number in numbers.values() if number is not None)
    return {name: None if number is None else number / max(last, 1) for name, number in numbers.items()}
