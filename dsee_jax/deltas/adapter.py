"""The adapter: all updates of a model, with everything that is needed to add them to it."""

import dataclasses
import functools
import math
import numbers
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.orientation import IN_OUT
from dsee_jax.typing import Array, Delta, Deltas, Supports


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("deltas", "supports"),
    meta_fields=("scale", "scale_sparse", "orientations"),
)
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The updates of a model, as from `dsee_jax.deltas.init`: a pytree whose leaves are the arrays of deltas and supports.

    ``jax.grad`` is taken with respect to ``deltas``::

        jax.grad(lambda deltas: loss(adapter.replace(deltas=deltas)))(adapter.deltas)

    ``flax.serialization`` reads the adapter that was written, whatever the target.
    """

    deltas: Deltas
    """Trained: nested dicts; at each updated kernel ``a`` (stack..., in, r) and ``b`` (stack..., r, out), and/or ``values``
    (stack..., nonzeros). ``in`` and ``out`` are those of the kernel's matrix (`dsee_jax.orientation`)."""
    supports: Supports
    """Fixed: int32 (stack..., nonzeros, 2) at each kernel with values: row (input) and column (output) of the matrix."""
    scale: float | Array
    """The factor of a @ b: alpha / rank. A static float; inside of a traced function it may be traced too."""
    scale_sparse: bool
    """Whether the values have the factor ``scale`` too, or none. Static."""
    orientations: tuple[tuple[str, str], ...] = ()
    """``(path, orientation)`` of the updated kernels that are neither (in, out) nor stacks of such kernels. Static."""

    def __post_init__(self) -> None:
        scale: Any = self.scale
        if isinstance(scale, Tracer) and scale.ndim == 0:
            return
        number = isinstance(scale, numbers.Real | np.ndarray | jax.Array) and not isinstance(scale, bool)
        if not number or np.ndim(np.asarray(scale)) or not math.isfinite(scale):
            raise InputError(f"the scale of an adapter is {scale!r}; expected a finite number: alpha / rank")
        object.__setattr__(self, "scale", float(scale))
        if (serialization := sys.modules.get("flax.serialization")) is not None:
            _register(serialization)

    def replace(self, **changes: Any) -> "Adapter":
        """Return the adapter with other values of some fields.

        Raises:
          InputError: the new deltas have another rank than the old ones, for which ``scale`` is not meant.
        """
        if "deltas" in changes and self.deltas:
            before, after = kernels(self.deltas), kernels(changes["deltas"])
            for path in before.keys() & after.keys():
                old, new = (_rank(each[path]) for each in (before, after))
                if None not in (old, new) and old != new and "scale" not in changes:
                    raise InputError(
                        f"the new update of {path!r} has the rank {new} and the adapter the rank {old}, which decides its "
                        f"scale {self.scale}: give the scale too, or create the adapter with deltas.init"
                    )
        return dataclasses.replace(self, **changes)

    @property
    def updates(self) -> "dict[str, Update]":
        """The update of every kernel, by path.

        Raises:
          InputError: values have no support, or a support no values.
        """
        supports, orientations = tree.flatten(self.supports), dict(self.orientations)
        deltas = kernels(self.deltas)
        for path in {path for path, delta in deltas.items() if "values" in delta} ^ supports.keys():
            present, absent = ("a support", "values") if path in supports else ("values", "support")
            raise InputError(
                f"the update of {path!r} has {present} and no {absent}: deltas and supports must be of one adapter"
            )
        return {
            path: Update(delta, supports.get(path), orientations.get(path) or _usual(delta))
            for path, delta in deltas.items()
        }


@functools.cache
def _register(serialization: Any) -> None:
    """Let ``flax.serialization`` write and read adapters. Flax is not imported for this."""

    def to_state(adapter: Adapter) -> dict[str, Any]:
        fields = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}
        return serialization.to_state_dict(fields | {"orientations": dict(adapter.orientations)})

    def from_state(_: Adapter, state: dict[str, Any]) -> Adapter:
        orientations: Any = tuple(state["orientations"].items())
        return Adapter(**state | {"orientations": orientations})

    serialization.register_serialization_state(Adapter, to_state, from_state)


def updates_of(adapter: Adapter | None) -> "dict[str, Update]":
    """Return `Adapter.updates`; none for None. Raises `InputError` for another type, such as the deltas alone."""
    if adapter is None:
        return {}
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the adapter is of the type {type(adapter).__name__}; expected an Adapter or None: pass the result of "
            "dsee_jax.deltas.init, or adapter.replace(deltas=...)"
        )
    return adapter.updates


class Update(NamedTuple):
    """The update of one kernel."""

    delta: Delta
    support: Array | None
    orientation: str


def _rank(delta: Delta) -> int | None:
    """Return the rank of an update; None without a low-rank part, or where a and b do not belong to each other."""
    shapes: list[tuple[int, ...]] = [getattr(delta.get(part), "shape", ()) for part in ("a", "b")]
    if min(map(len, shapes)) < 2 or shapes[0][-1] != shapes[1][-2]:
        return None
    return shapes[0][-1]


def _usual(delta: Delta) -> str:
    """Return the orientation of a kernel (stack..., in, out)."""
    axes = delta["values"].ndim + 1 if "values" in delta else next(iter(delta.values())).ndim
    return "_".join(["stack"] * (axes - 2) + [IN_OUT])


_PARTS = frozenset({"a", "b", "values"})


def _is_delta(node: Any) -> bool:
    return (
        isinstance(node, Mapping)
        and bool(node)
        and _PARTS.issuperset(node)
        and not any(isinstance(leaf, Mapping) for leaf in node.values())
    )


def kernels(deltas: Deltas | None) -> dict[str, Delta]:
    """Return ``{kernel path: delta}``; paths are sorted at every level."""
    return tree.flatten(deltas, is_leaf=_is_delta) if deltas else {}


def count(deltas: Deltas | None) -> int:
    """Return the number of trained parameters of the updates; coordinates are not trained and do not count."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(deltas))
