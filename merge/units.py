"""Units: which tensors share one coefficient, and how much each unit changed.

A unit is named by a regular expression with a group ``unit``, searched in a tensor's path or name; ``layer`` and ``tensor``
stand for the two that everybody wants. Tensors that no unit takes (embeddings, final norm, head) are outside.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from dsee_jax.aliases import Array
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


def changes(deltas: Mapping[str, Array], units: Mapping[str, str | None]) -> dict[str, jax.Array]:
    """Return ``{unit: sum of |delta| over its tensors}`` as float32 scalars, units in the order they appear."""
    sums: dict[str, jax.Array] = {}
    for name, delta in deltas.items():
        unit = units[name]
        if unit is not None:
            sums[unit] = sums.get(unit, jnp.zeros((), jnp.float32)) + jnp.sum(jnp.abs(delta.astype(jnp.float32)))
    return sums
