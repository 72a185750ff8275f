"""Updates attached to a running Linen model, of any modules, without a change of the model.

In a block of `attached` every updated kernel in the params of a model becomes a box (a Flax ``AxisMetadata``) that holds the
kernel and its update. A box passes through ``nn.scan``, ``nn.vmap``, ``nn.remat`` and ``nn.jit`` as any param does. A module
that reads its kernel with ``self.param`` gets the kernel with the update folded in, so every module computes with it.

Linear modules do better, and form no gradient of a kernel's size in the backward pass:

- ``nn.Dense`` with its own product, and `dsee_jax.ops.joint.JointDense`, run `dsee_jax.ops.dense` in place of their product.
- ``nn.Dense`` with another product (``dot_general``, ``precision``...), ``nn.DenseGeneral``, ``nn.Einsum`` and a 1 x 1
  ``nn.Conv`` run as they are with the frozen kernel, and the thin product with the update is added to their output. So do
  subclasses that call the ``__call__`` of these classes.

A function of ``nn.map_variables`` sees the arrays of a box as params: `materialize` the params of a model that maps them.
"""

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from flax.linen.module import _global_interceptor_stack  # pyright: ignore[reportPrivateUsage]

from dsee_jax import orientation, tree
from dsee_jax.deltas import thin
from dsee_jax.deltas.adapter import Adapter, Update
from dsee_jax.deltas.fold import check, folded
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.ops import dense
from dsee_jax.ops.joint import JointDense
from dsee_jax.typing import Module, Params

_blocks = jax.make_user_context(())
"""The blocks around the code that runs. JAX traces a jitted function again in every other block."""

_numbers = itertools.count()


@contextlib.contextmanager
def intercepted(function: Callable[..., Any]) -> Iterator[None]:
    """Intercept the calls of Linen modules in the block, as ``flax.linen.intercept_methods`` does.

    Flax ends an interceptor inside of an ``assert``. ``python -O`` leaves it out, and the interceptor would act for ever.
    """
    before = len(_global_interceptor_stack)
    try:
        with nn.intercept_methods(function):
            yield
    finally:
        while len(_global_interceptor_stack) > before:
            _global_interceptor_stack.pop()


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the input of a call of a linear module, given by position or by the keyword ``inputs``."""
    return args[0] if args else kwargs["inputs"]


def linear(context: Any) -> list[str]:
    """Return the paths of the kernels that an intercepted call of a linear module applies, in the order of its outputs.

    Empty for any other call. A `JointDense` has several outputs, a tuple.
    """
    module = context.module
    joint = module.joint if isinstance(module, JointDense) else None
    if context.method_name != "__call__" or module.scope is None or not (joint or isinstance(module, nn.Dense)):
        return []
    return ["/".join(filter(None, (*module.path, name, "kernel"))) for name in joint or ("",)]


@contextlib.contextmanager
def attached(adapter: Adapter | None, *, joined: bool = True) -> Iterator[None]:
    """Attach an adapter to every Linen model that runs in the block.

    ::

        with dsee_jax.attached(adapter):
            y, state = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

    A model takes the updates at the outermost of its calls, by the paths of its params. A jitted function with the block
    inside has the adapter as an argument. A jitted function that is called in a block is compiled anew for every block, with
    the adapter as a constant. Bind a module (``bind``) in the block where it runs: its ``setup`` reads the params only once.

    Args:
      adapter: the updates; None attaches none.
      joined: multiply by the kernels of a `JointDense` at once. False where their outputs are sharded over devices, as the
        joint product would move them.

    Raises:
      InputError: an update does not fit its kernel, or no module of the block read it.
    """
    block = _Block(adapter, joined)
    try:
        with _blocks((*_blocks.value, next(_numbers))), intercepted(block.intercept):
            yield
        block.check_read()
    finally:
        block.end()


def apply(
    model: Module, params: Params, adapter: Adapter | None, batch: Any, *, joined: bool = True, **options: Any
) -> Any:
    """Run a Linen model with an adapter attached: `attached` for a model that has params alone.

    Args:
      model: any Linen module.
      params: the params of the model.
      adapter: as from `dsee_jax.deltas.init`; None for no updates.
      batch: a mapping holds keyword arguments of the model, a tuple positional arguments; anything else is the only argument.
      joined: as in `attached`.
      **options: passed to ``model.apply``, such as ``deterministic``, ``rngs`` and ``method``.

    Returns:
      The outputs of the model, differentiable with respect to ``adapter.deltas`` alone.

    Raises:
      InputError: the model is no Linen module, an update does not fit its kernel, or no module read it.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"expected a Linen module, found {type(model).__name__}; dsee_jax.nnx.attach is for NNX modules, "
            "dsee_jax.materialize for any pytree"
        )
    args, kwargs = (
        ((), dict(batch)) if isinstance(batch, Mapping) else (batch if isinstance(batch, tuple) else (batch,), {})
    )
    if adapter is None and joined:
        return model.apply({"params": params}, *args, **kwargs, **options)
    with attached(adapter, joined=joined):
        return model.apply({"params": params}, *args, **kwargs, **options)


class _Block:
    """One block of `attached`: the adapter, and the paths of the kernels that modules have read."""

    def __init__(self, adapter: Adapter | None, joined: bool) -> None:
        self.scale = {} if adapter is None else {"scale": adapter.scale, "scale_sparse": adapter.scale_sparse}
        self.updates = {} if adapter is None else adapter.updates
        self.joined, self.active = joined, True
        self.root: Any = None
        self.scopes: dict[int, Any] = {}
        self.read: set[str] = set()
        self.present: set[str] = set()
        self.params: Any = {}

    def intercept(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if module.scope is None:
            return call(*args, **kwargs)
        if self.root is None:
            with self._boxed(module.scope.root):
                return self.intercept(call, args, kwargs, context)
        self._refresh(module.scope)
        # A subclass that overrides __call__ and calls its parent's is met there, with the input that the parent gets.
        method = _METHODS.get(context.orig_method.func)
        return call(*args, **kwargs) if method is None else method(self, module, call, args, kwargs)

    @contextlib.contextmanager
    def _boxed(self, root: Any) -> Iterator[None]:
        """Put boxes in place of the updated kernels of a root scope, for one call of a model."""
        params = root._variables.get("params", {})
        boxed = self._with_boxes(params, "/".join(root.path))
        self.root, self.scopes, self.params = root, {}, params or self.params
        if params:
            root._variables["params"] = boxed
        try:
            # The operations inside of a model are compiled once for all blocks.
            with _blocks(()):
                yield
        finally:
            self.root = None
            if params:
                # A call may have changed mutable params: only the boxes go.
                mutable = root.is_mutable_collection("params")
                root._variables["params"] = self._without_boxes(root._variables["params"]) if mutable else params
            for scope in self.scopes.values():
                scope._variables.pop("params", None)

    def _refresh(self, scope: Any) -> None:
        """Let ``scope`` and the scopes around it look their params up again, as a bound module keeps its scopes."""
        while scope.parent is not None and id(scope) not in self.scopes:
            self.scopes[id(scope)] = scope
            scope._variables.pop("params", None)
            scope = scope.parent

    def _with_boxes(self, node: Any, prefix: str) -> Any:
        """Return nested dicts of params with boxes at the updated kernels; a box of the user's stays inside of ours."""
        if prefix in self.updates:
            update = self.updates[prefix]
            # The first leaf of a box is its value.
            check(prefix, jax.tree.leaves(node)[0].shape, update)
            self.present.add(prefix)
            delta, support, axes = update
            delta, support = thin.move_stacks(axes, (delta, support), back=False)
            return _Box(node, delta, support, prefix, axes, self)
        below = f"{prefix}/" if prefix else ""
        if not isinstance(node, Mapping) or not any(path.startswith(below) for path in self.updates):
            return node
        return {key: self._with_boxes(child, f"{below}{key}") for key, child in node.items()}

    def _without_boxes(self, params: Any) -> Any:
        own = lambda node: isinstance(node, _Box) and node.block is self  # noqa: E731
        return jax.tree.map(lambda leaf: leaf.value if own(leaf) else leaf, params, is_leaf=own)

    def box(self, kernel: Any) -> "_Box | None":
        """Return ``kernel`` if it is a box of this block."""
        return kernel if isinstance(kernel, _Box) and kernel.block is self else None

    def kernel(self, module: nn.Module) -> "_Box | None":
        """Return the box of the kernel of a linear module, if the kernel has an update."""
        return self.box(module.get_variable("params", "kernel")) if module.has_variable("params", "kernel") else None

    def check_read(self) -> None:
        """Raise `InputError` unless modules have read all updated kernels."""
        missed = [path for path in self.updates if path not in self.read]
        if not missed:
            return
        path, many = missed[0], f"({len(missed)} of {len(self.updates)} updates)"
        if path in self.present:
            raise InputError(
                f"the update of {path!r} {many} reached no module: no call in the block read this kernel as a param; "
                "leave it out of delta.targets, or call the part of the model that holds it"
            )
        near = did_you_mean(path, tree.flatten(self.params))
        raise InputError(
            f"the update of {path!r} {many} reached no module: the params of the model have no such path{near}; the adapter "
            "belongs to another model, or a jitted function that was traced in another block ran: attach inside of the "
            "jitted function"
        )

    def end(self) -> None:
        """Unbox to frozen kernels from now on, and let go of the arrays: compiled functions of ``nn.jit`` keep the block."""
        self.active, self.updates, self.params, self.scopes = False, {}, {}, {}


class _Box(meta.AxisMetadata[Any]):
    """A kernel and its update in the params of a running model; it unboxes to the kernel with the update folded in."""

    def __init__(self, value: Any, delta: Any, support: Any, path: str, axes: str, block: _Block) -> None:
        self.value, self.delta, self.support = value, delta, support
        self.path, self.axes, self.block = path, axes, block
        self.frozen = False

    def unbox(self) -> Any:
        """Return the effective kernel, in the box of the kernel if it has one; in `as_frozen`, the kernel itself."""
        if self.frozen or not self.block.active:
            return self.value
        update = self.update()
        self.block.read.add(self.path)
        w = tree.unboxed(self.value)
        return tree.reboxed(self.value, folded(w, self.path, update, **self.block.scale))

    def update(self) -> Update:
        """Return the update of the kernel as a module sees it: without the stacks that loops have taken apart."""
        axes = orientation.at_use(self.axes, len(tree.unboxed(self.value).shape))
        delta, support = thin.move_stacks(axes, (self.delta, self.support), back=True)
        return Update(delta, support, axes)

    @contextlib.contextmanager
    def as_frozen(self) -> Iterator[None]:
        """Unbox to the kernel without its update."""
        self.frozen = True
        try:
            yield
        finally:
            self.frozen = False

    def replace_boxed(self, val: Any) -> "_Box":
        """Return the box of another kernel."""
        return _Box(val, self.delta, self.support, self.path, self.axes, self.block)

    def add_axis(self, index: int, params: Any) -> "_Box":
        """Return the box with an axis more in the box of the kernel; the update knows its axes."""
        return self.replace_boxed(meta.add_axis(self.value, index, params))

    def remove_axis(self, index: int, params: Any) -> "_Box":
        """Return the box with an axis less in the box of the kernel."""
        return self.replace_boxed(meta.remove_axis(self.value, index, params))

    def __jax_array__(self) -> Any:
        """Return the effective kernel to a function that reads the variables of a module as arrays."""
        return tree.unboxed(self.unbox())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__jax_array__(), name)


jax.tree_util.register_pytree_node(
    _Box,
    lambda box: ((box.value, box.delta, box.support), (box.path, box.axes, box.block)),
    lambda about, children: _Box(*children, *about),
)


def _fitting(box: _Box, module: nn.Module, expected: str) -> Update:
    """Return the update of a kernel that the module multiplies by with the orientation ``expected``."""
    update = box.update()
    thin.check_orientation(box.path, update, module, expected)
    box.block.read.add(box.path)
    return update


_PRODUCT = [
    field
    for field in dataclasses.fields(nn.Dense)
    if field.name not in ("features", "use_bias", "dtype", "param_dtype", "kernel_init", "bias_init", "parent", "name")
]
"""The attributes of an ``nn.Dense`` that change its product, such as ``dot_general`` and ``precision``."""


def _dense(block: _Block, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    box = block.kernel(module)
    if box is None:
        return call(*args, **kwargs)
    update = _fitting(box, module, orientation.IN_OUT)
    if any(getattr(module, field.name) is not field.default for field in _PRODUCT):
        return _beside(block, box, update, call, args, kwargs)
    bias = tree.unboxed(module.get_variable("params", "bias")) if module.use_bias else None
    x, kernel, bias = promote_dtype(input_of(args, kwargs), tree.unboxed(box.value), bias, dtype=module.dtype)
    return dense.dense(x, kernel, bias, update.delta, update.support, **block.scale)


def _joint(block: _Block, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    members = [module.get_variable("params", name) for name in module.joint] if _initialised(module) else []
    boxes = [block.box(member["kernel"]) for member in members]
    if not any(boxes) and (block.joined or not members):
        return call(*args, **kwargs)
    updates = [_fitting(box, module, orientation.IN_OUT) if box else Update({}, None, "") for box in boxes]
    kernels = [
        tree.unboxed(member["kernel"] if box is None else box.value) for box, member in zip(boxes, members, strict=True)
    ]
    biases = [tree.unboxed(member["bias"]) if "bias" in member else None for member in members]
    x, *values = promote_dtype(args[0] if args else kwargs["x"], *kernels, *biases, dtype=module.dtype)
    kernels, biases = values[: len(kernels)], values[len(kernels) :]
    deltas, supports = tuple(update.delta for update in updates), tuple(update.support for update in updates)
    options: Any = block.scale or {"scale": 1.0}
    if block.joined:
        return dense.joint_dense(x, tuple(kernels), tuple(biases), deltas, supports, **options)
    parts = zip(kernels, biases, deltas, supports, strict=True)
    return tuple(dense.dense(x, *part, **options) for part in parts)


def _initialised(module: Any) -> bool:
    return module.has_variable("params", module.joint[0])


def _beside(
    block: _Block,
    box: _Box,
    update: Update,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    *,
    axes: Sequence[int] = (-1,),
) -> Any:
    """Return the output of the module itself plus the product of its input, whose input axes are ``axes``, and the update."""
    with box.as_frozen():
        y = call(*args, **kwargs)
    return thin.add(input_of(args, kwargs), y, update, tree.unboxed(box.value).shape, block.scale, axes=axes)


def _general(block: _Block, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    box = block.kernel(module)
    if box is None or module.batch_dims:
        return call(*args, **kwargs)
    axes = [module.axis] if isinstance(module.axis, int) else [*module.axis]
    features = [module.features] if isinstance(module.features, int) else [*module.features]
    update = _fitting(box, module, thin.general_orientation(len(axes), len(features)))
    return _beside(block, box, update, call, args, kwargs, axes=axes)


def _conv(block: _Block, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    box = block.kernel(module)
    expected = thin.pointwise_orientation(module) if isinstance(module, nn.Conv) else None
    if box is None or expected is None:
        return call(*args, **kwargs)
    update = _fitting(box, module, expected)
    return _beside(block, box, update, call, args, kwargs)


def _einsum(block: _Block, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    box = block.kernel(module)
    equation = (args[1] if len(args) > 1 else kwargs.get("einsum_str")) or module.einsum_str
    parts = None if box is None else thin.einsum(equation)
    if box is None or parts is None:
        return call(*args, **kwargs)
    update = _fitting(box, module, parts.orientation)
    with box.as_frozen():
        y = call(*args, **kwargs)
    return parts.add(input_of(args, kwargs), y, update, tree.unboxed(box.value).shape, block.scale)


def _normalised(block: _Block, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    layer = "/".join(module.layer_instance.path)
    for path in block.updates:
        if path.startswith(f"{layer}/"):
            raise InputError(
                f"{path!r} takes no update: {type(module).__name__} normalises the params of {layer!r}, and would normalise "
                "the arrays of the update too; leave it out of delta.targets, or run the model with materialize"
            )
    return call(*args, **kwargs)


_METHODS: dict[Callable[..., Any], Callable[..., Any]] = {
    inspect.unwrap(nn.Dense.__call__): _dense,
    inspect.unwrap(JointDense.__call__): _joint,
    inspect.unwrap(nn.DenseGeneral.__call__): _general,
    inspect.unwrap(nn.Conv.__call__): _conv,
    inspect.unwrap(nn.Einsum.__call__): _einsum,
    inspect.unwrap(nn.WeightNorm.__call__): _normalised,
    inspect.unwrap(nn.SpectralNorm.__call__): _normalised,
}
"""The methods of linear modules whose product with an update is computed thin, and of modules that map params."""
