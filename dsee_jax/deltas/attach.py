"""Updates attached to a running Linen model by an interceptor of every ``nn.Dense`` and every joint projection."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.module import _global_interceptor_stack  # pyright: ignore[reportPrivateUsage]

from dsee_jax.deltas.fold import SCALE, kernels
from dsee_jax.errors import InputError
from dsee_jax.ops import dense
from dsee_jax.typing import Deltas, Module, Params, Supports


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


def interceptor(
    *, scale: float, scale_sparse: bool = True, seen: set[str] | None = None, joined: bool = True
) -> Callable[..., Any]:
    """Return a function for `intercepted` that adds the collections ``delta`` and ``support`` to kernels.

    The interceptor acts on ``nn.Dense`` and on joint projections (modules with an attribute ``joint``).

    Args:
      scale: alpha / rank.
      scale_sparse: whether S is scaled too.
      seen: receives the paths of the updated kernels.
      joined: False multiplies by the kernels of a joint projection one by one.
    """

    def intercept(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, names = context.module, getattr(context.module, "joint", None)
        if context.method_name != "__call__" or module.scope is None or not (names or isinstance(module, nn.Dense)):
            return call(*args, **kwargs)
        prefix = "/".join(module.path)
        # A Dense counts as a joint projection of one kernel, which the Dense itself holds.
        read = (
            (lambda kind, name: _variable(module, kind, name))
            if names
            else (lambda kind, _: module.variables.get(kind))
        )
        deltas = [(read("delta", name) or {}).get("kernel", {}) for name in names or ("",)]
        one_by_one = not joined and names and module.has_variable("params", names[0])
        if not any(deltas) and not one_by_one:
            return call(*args, **kwargs)
        if seen is not None:
            paths = ("/".join(filter(None, (prefix, name, "kernel"))) for name in names or ("",))
            seen.update(path for path, delta in zip(paths, deltas, strict=True) if delta)
        parameters: list[Any] = [read("params", name) for name in names or ("",)]
        supports = [(read("support", name) or {}).get("kernel") for name in names or ("",)]
        x, *values = promote_dtype(
            *args, *(p[k] for p in parameters for k in ("kernel", "bias") if k in p), dtype=module.dtype
        )
        values = iter(values)
        cast = [{k: next(values) for k in ("kernel", "bias") if k in p} for p in parameters]
        parts = [(p["kernel"], p.get("bias"), d, s) for p, d, s in zip(cast, deltas, supports, strict=True)]
        options = {"scale": scale, "scale_sparse": scale_sparse}
        if one_by_one:
            return tuple(dense.dense(x, *part, **options) for part in parts)
        outputs = dense.joint_dense(x, *zip(*parts, strict=True), **options)
        return outputs if names else outputs[0]

    return intercept


def _variable(module: nn.Module, collection: str, name: str) -> Any:
    return module.get_variable(collection, name) if module.has_variable(collection, name) else None


def apply(
    model: Module,
    params: Params,
    deltas: Deltas | None,
    supports: Supports | None,
    batch: Any,
    *,
    scale: float = SCALE,
    scale_sparse: bool = True,
    joined: bool = True,
    **options: Any,
) -> Any:
    """Run a Linen model with its updates attached.

    Args:
      model: any Linen module; updated kernels must belong to an ``nn.Dense`` or a joint projection.
      params: the params of the model.
      deltas, supports: as from `init`; None for no updates.
      batch: a mapping holds keyword arguments of the model, a tuple positional arguments; anything else is the only argument.
      scale: alpha / rank.
      scale_sparse: whether S is scaled too.
      joined: multiply by the kernels of a joint projection at once. False where their outputs are sharded over devices, as the
        joint product would move them.
      **options: passed to ``model.apply``, such as ``deterministic``, ``rngs`` and ``method``.

    Returns:
      The outputs of the model. Differentiable with respect to ``deltas`` alone: no gradient of a kernel is formed.

    Raises:
      InputError: an update reached no module that takes updates.
    """
    variables = {"params": params, "delta": deltas or {}, "support": supports or {}}
    args, kwargs = (
        ((), dict(batch)) if isinstance(batch, Mapping) else (batch if isinstance(batch, tuple) else (batch,), {})
    )
    if not deltas and joined:
        return model.apply({"params": params}, *args, **kwargs, **options)
    seen: set[str] = set()
    with intercepted(interceptor(scale=scale, scale_sparse=scale_sparse, seen=seen, joined=joined)):
        outputs = model.apply(variables, *args, **kwargs, **options)
    _all_seen(kernels(deltas), seen)
    return outputs


def _all_seen(paths: Iterable[str], seen: set[str]) -> None:
    missed = [path for path in paths if path not in seen]
    if missed:
        raise InputError(
            f"the update of {missed[0]!r} reached no nn.Dense or joint projection ({len(missed)} such): "
            "remove its kernel from delta.targets, or fold the updates with materialize"
        )
