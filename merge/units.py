"""Units: which tensors share one coefficient.

A unit is named by a regular expression with a group ``unit``, searched in a tensor's path or name; ``layer`` and ``tensor``
stand for the two that everybody wants. Tensors that no unit takes (embeddings, final norm, head) are outside.
"""

import re
from collections.abc import Sequence

from dsee_jax.errors import InputError

LAYER = r"(?:^|[./_])(?:layers?|h|blocks?)[./_](?P<unit>\d+)(?=[./])"
"""A numbered transformer layer in the names of Hugging Face and of this library."""


def of(names: Sequence[str], unit: str) -> dict[str, str | None]:
    """Return ``{name: unit}``, None for names outside every unit.

    Args:
      names: paths or names of tensors.
      unit: ``layer``, ``tensor``, or a regular expression with a group named ``unit``.

    Raises:
      InputError: not a regular expression, no such group, or it matches nothing.
    """
    if unit == "tensor":
        return {name: name for name in names}
    try:
        pattern = re.compile(LAYER if unit == "layer" else unit)
    except re.error as error:
        raise InputError(f"unit {unit!r} is neither layer, tensor nor a regular expression: {error}") from None
    if "unit" not in pattern.groupindex:
        raise InputError(f"unit {unit!r} names no group; write (?P<unit>...) around what tells units apart")
    found = {name: match["unit"] if (match := pattern.search(name)) else None for name in names}
    if not any(found.values()):
        raise InputError(f"unit {unit!r} matches no tensor; the first is {next(iter(names), None)!r}")
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key to sort by in which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def depths(names: Sequence[str]) -> dict[str, float | None]:
    """Return ``{name: l / (L - 1)}``, the relative depth in [0, 1] of its layer l of L; None for tensors outside layers."""
    numbers = {name: None if unit is None else int(unit) for name, unit in of(names, "layer").items()}
    last = max(number for number in numbers.values() if number is not None)
    return {name: None if number is None else number / max(last, 1) for name, number in numbers.items()}
