"""Updates attached to Flax NNX modules, of any layers, without a change of the modules.

::

    adapter = dsee_jax.deltas.init(nnx.state(module, nnx.Param), config, key=key)
    tuned = dsee_jax.nnx.attach(module, adapter)
    optimizer = nnx.Optimizer(tuned, optax.adamw(1e-3), wrt=dsee_jax.nnx.Delta)
    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, dsee_jax.nnx.Delta))(tuned, batch)
    optimizer.update(tuned, gradients)
    plain = dsee_jax.materialize(nnx.state(module, nnx.Param), dsee_jax.nnx.adapter(tuned))

The attribute ``kernel`` of an updated layer reads as the kernel with the update folded in, so every module computes with it.
Linear layers do better, and form no gradient of a kernel's size in the backward pass:

- ``nnx.Linear`` with its own product runs `dsee_jax.ops.dense` in place of its product.
- ``nnx.Linear`` with another product (``dot_general``, ``precision``...), ``nnx.LinearGeneral``, ``nnx.Einsum`` and a 1 x 1
  ``nnx.Conv`` run as they are with the frozen kernel, and the thin product with the update is added to their output. So do
  subclasses that call the ``__call__`` of these classes.
"""

import functools
import types
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from dsee_jax import orientation, tree
from dsee_jax.deltas import thin
from dsee_jax.deltas.adapter import Adapter, Update, updates_of
from dsee_jax.deltas.fold import check, folded
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.ops import dense

__all__ = ["Delta", "Support", "adapter", "attach"]

M = TypeVar("M")


class Delta(nnx.Variable[jax.Array]):
    """A trained array of an update: ``a``, ``b`` or ``values``, as in `dsee_jax.Adapter`."""


class Support(nnx.Variable[jax.Array]):
    """The fixed coordinates of ``values``."""


class _KernelUpdate(nnx.Pytree):
    """The update of the kernel ``NAME`` of a module, which holds it as ``NAME_update``.

    The stacks of its arrays are at the axes where the kernel has them: a loop over a stack of layers takes both alike.
    """

    def __init__(self, update: Update, scale: Any, scale_sparse: bool) -> None:
        delta, support = thin.move_stacks(update.orientation, (update.delta, update.support), back=False)
        for name, array in delta.items():
            setattr(self, name, Delta(array))
        if support is not None:
            self.support = Support(support)
        self.orientation = update.orientation
        self.scale, self.scale_sparse = scale, scale_sparse


def _at_use(update: _KernelUpdate, axes: int) -> Update:
    """Return the update of a kernel of ``axes`` axes: without the stacks that loops have taken apart."""
    words = orientation.at_use(update.orientation, axes)
    arrays = {name: value.get_value() for name, value in vars(update).items() if isinstance(value, nnx.Variable)}
    arrays = thin.move_stacks(words, arrays, back=True)
    support = arrays.pop("support", None)
    return Update(arrays, support, words)


def _scales(update: _KernelUpdate) -> dict[str, Any]:
    return {"scale": update.scale, "scale_sparse": update.scale_sparse}


def attach(module: M, adapter: Adapter | None) -> M:
    """Return an NNX module like ``module`` that computes with the updates of an adapter.

    The updates are variables of the returned module, of the types `Delta` and `Support`, so that NNX trains them in its own
    way; `adapter` returns them. Inside of a loss the adapter may be traced::

        jax.grad(lambda deltas: loss(dsee_jax.nnx.attach(module, adapter.replace(deltas=deltas))))(adapter.deltas)

    ``module`` is not changed, and shares arrays but no variables with the returned module. The variables that a call changes,
    such as the statistics of ``nnx.BatchNorm`` and the counters of ``nnx.Rngs``, change in the returned module alone:
    ``nnx.update(module, nnx.state(attached, nnx.BatchStat))`` takes them over.

    Args:
      module: any NNX module; also one that ``nnx.vmap`` made, with stacked kernels.
      adapter: updates at paths of ``nnx.state(module)``; None attaches none.

    Raises:
      InputError: the module has no such path, the update does not fit the kernel, its orientation is not that of the layer, a
        module around the layer replaces the kernel (``nnx.WeightNorm``), or the kernel has an update already.
    """
    if not isinstance(module, nnx.Pytree):
        raise InputError(
            f"expected an NNX module, found {type(module).__name__}; dsee_jax.attached is for Linen modules, "
            "dsee_jax.materialize for any pytree"
        )
    updates, copied = updates_of(adapter), nnx.clone(module)
    if adapter is None:
        return copied
    _check_wrappers(copied, adapter)
    variables, holders = _variables(copied), _holders(copied)
    names: dict[int, tuple[Any, list[str]]] = {}
    for path, update in updates.items():
        if path not in variables:
            raise InputError(f"the module has no variable {path!r}, which has an update{did_you_mean(path, variables)}")
        kernel = variables[path]
        check(path, kernel.shape, update)
        if id(kernel) not in holders:
            raise InputError(
                f"{path!r} has an update and is an item of a plain list or dict; expected an attribute of an NNX module: "
                "use nnx.List or nnx.Dict"
            )
        variable_update = _KernelUpdate(update, adapter.scale, adapter.scale_sparse)
        for holder, name in holders[id(kernel)]:
            if hasattr(holder, f"{name}_update"):
                raise InputError(f"{path!r} has an update already; attach the adapter to the module without updates")
            expected = _orientation(holder) if name == "kernel" else None
            if expected is not None:
                stackless = "_".join(word for word in update.orientation.split("_") if word != "stack")
                thin.check_orientation(path, update._replace(orientation=stackless), holder, expected)
            setattr(holder, f"{name}_update", variable_update)
            names.setdefault(id(holder), (holder, []))[1].append(name)
    for holder, updated in names.values():
        object.__setattr__(holder, "__class__", _updated(type(holder), tuple(sorted(updated))))
    return copied


def adapter(module: Any) -> Adapter:
    """Return the adapter of a module from `attach`, with the updates as they are now.

    Raises:
      InputError: the module has no updates.
    """
    holders = _holders(module)
    updates: dict[str, _KernelUpdate] = {}
    for path, kernel in _variables(module).items():
        for holder, name in holders.get(id(kernel), []):
            if isinstance(update := vars(holder).get(f"{name}_update"), _KernelUpdate):
                updates[path] = update
    if not updates:
        raise InputError("the module has no updates; expected one from dsee_jax.nnx.attach")
    parts = {path: _at_use(update, len(update.orientation.split("_"))) for path, update in updates.items()}
    return Adapter(
        tree.unflatten({path: dict(delta) for path, (delta, _, _) in parts.items()}),
        tree.unflatten({path: support for path, (_, support, _) in parts.items() if support is not None}),
        **_scales(next(iter(updates.values()))),
        orientations=tuple((path, axes) for path, (_, _, axes) in parts.items() if axes not in orientation.USUAL),
    )


_REPLACE_KERNELS = (nnx.WeightNorm, nnx.SpectralNorm, nnx.bridge.ToNNX)
"""The modules of Flax that compute with other kernels than those of their layers: normalised ones, or those of Linen."""


def _check_wrappers(module: Any, adapter: Adapter) -> None:
    for place, node in nnx.iter_graph(module, graph=True):
        if isinstance(node, _REPLACE_KERNELS):
            inside = "/".join(map(str, (*place, "")))
            if path := next((path for path in adapter.updates if path.startswith(inside)), None):
                raise InputError(
                    f"{path!r} has an update and is inside of {type(node).__name__}, which replaces the kernel at each call: "
                    "leave it out of delta.targets, or use dsee_jax.materialize"
                )


def _variables(module: Any) -> dict[str, nnx.Variable[Any]]:
    """Return the variables of a module by path; a shared one has the first of its paths, as in ``nnx.state``."""
    nodes = nnx.iter_graph(module, graph=True)
    return {"/".join(map(str, path)): node for path, node in nodes if isinstance(node, nnx.Variable)}


def _holders(module: Any) -> dict[int, list[tuple[Any, str]]]:
    """Return the modules that hold each variable, and the names of their attributes, by the id of the variable."""
    holders: dict[int, list[tuple[Any, str]]] = {}
    for _, node in nnx.iter_graph(module, graph=True):
        if isinstance(node, nnx.Pytree):
            for name, value in vars(node).items():
                if isinstance(value, nnx.Variable):
                    holders.setdefault(id(value), []).append((node, name))
    return holders


def _orientation(layer: Any) -> str | None:
    """Return the orientation by which a layer multiplies by its ``kernel``; None where that is no single matrix."""
    match layer:
        case nnx.Linear():
            return orientation.IN_OUT
        case nnx.LinearGeneral():
            inputs, outputs = len(layer.in_features), len(layer.out_features)
            return None if layer.batch_axis else thin.general_orientation(inputs, outputs)
        case nnx.Einsum():
            parts = thin.einsum(layer.einsum_str)
            return None if parts is None else parts.orientation
        case nnx.Conv():
            return thin.pointwise_orientation(layer)
    return None


@functools.cache
def _updated(kind: type, names: tuple[str, ...]) -> type:
    """Return the subclass of a class of modules whose attributes ``names`` have updates; one class for all such modules."""
    linear = next((base for base in _LAYERS if issubclass(kind, base)), None)
    # Before the layer of Flax in the order of the methods, and after all of its subclasses.
    bases = (kind,) if linear is None else (_LAYERS[linear],) if linear is kind else (kind, _LAYERS[linear])
    members = {"_without_updates": kind, "__module__": kind.__module__} | {name: _effective(name) for name in names}
    options = {"pytree": kind._pytree__is_pytree}  # pyright: ignore[reportAttributeAccessIssue]
    return types.new_class(kind.__name__, bases, options, lambda namespace: namespace.update(members))


def _effective(name: str) -> property:
    """Return the attribute ``name`` of an updated module: the kernel with the update folded in, to read."""

    def get(module: Any) -> Any:
        kernel, update = vars(module)[name], vars(module)[f"{name}_update"]
        value = kernel.get_value()
        effective = tree.reboxed(kernel, folded(value, name, _at_use(update, value.ndim), **_scales(update)))
        effective.set_metadata(on_set_value=_refuse)
        return effective

    def put(module: Any, value: Any) -> None:
        vars(module)[name] = value

    return property(get, put)


def _refuse(variable: Any, value: Any) -> None:
    raise InputError(
        "a kernel with an update reads as their sum and cannot be written in place: use nnx.update(module, state), or write "
        "to the module without updates"
    )


def _frozen(module: Any) -> tuple[Any, Update | None, dict[str, Any]]:
    """Return the layer without its update, the update of the kernel, and the scales of the update."""
    layer = object.__new__(module._without_updates)
    object.__setattr__(layer, "__dict__", vars(module))
    update = vars(module).get("kernel_update")
    return (layer, None, {}) if update is None else (layer, _at_use(update, layer.kernel.ndim), _scales(update))


class _Linear(nnx.Linear):
    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        layer, update, scales = _frozen(self)
        if update is None:
            return super().__call__(inputs, out_sharding)
        product = (layer.dot_general, layer.promote_dtype, layer.precision, layer.preferred_element_type, out_sharding)
        if product != (jax.lax.dot_general, promote_dtype, None, None, None):
            y = nnx.Linear.__call__(layer, inputs, out_sharding)
            return thin.add(inputs, y, update, layer.kernel.shape, scales)
        bias = None if layer.bias is None else layer.bias[...]
        x, kernel, bias = promote_dtype((inputs, layer.kernel[...], bias), dtype=layer.dtype)
        return dense.dense(x, kernel, bias, update.delta, update.support, **scales)


class _LinearGeneral(nnx.LinearGeneral):
    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        layer, update, scales = _frozen(self)
        if update is None or layer.batch_axis:
            return super().__call__(inputs, *args, **kwargs)
        y = nnx.LinearGeneral.__call__(layer, inputs, *args, **kwargs)
        return thin.add(inputs, y, update, layer.kernel.shape, scales, axes=layer.axis)


class _Einsum(nnx.Einsum):
    def __call__(self, inputs: Any, einsum_str: str | None = None, *args: Any, **kwargs: Any) -> Any:
        layer, update, scales = _frozen(self)
        parts = thin.einsum(einsum_str or layer.einsum_str)
        if update is None or parts is None or parts.orientation != update.orientation:
            return super().__call__(inputs, einsum_str, *args, **kwargs)
        y = nnx.Einsum.__call__(layer, inputs, einsum_str, *args, **kwargs)
        return parts.add(inputs, y, update, layer.kernel.shape, scales)


class _Conv(nnx.Conv):
    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        layer, update, scales = _frozen(self)
        if update is None or thin.pointwise_orientation(layer) is None:
            return super().__call__(inputs, *args, **kwargs)
        y = nnx.Conv.__call__(layer, inputs, *args, **kwargs)
        return thin.add(inputs, y, update, layer.kernel.shape, scales)


class _Dict(nnx.Dict[Any]):
    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if not isinstance(vars(self)[name], _KernelUpdate))


_LAYERS: dict[type, type] = {
    nnx.Linear: _Linear,
    nnx.LinearGeneral: _LinearGeneral,
    nnx.Einsum: _Einsum,
    nnx.Conv: _Conv,
    nnx.Dict: _Dict,
}
"""The modules of Flax with another method where a kernel in them has an update."""
