"""Updates attached to a Linen model while it runs: an interceptor of every ``nn.Dense`` and of every joint projection."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
from flax.linen.dtypes import promote_dtype

from dsee_jax.deltas.fold import SCALE, kernels
from dsee_jax.errors import InputError
from dsee_jax.ops import dense
from dsee_jax.typing import Deltas, Params, Supports


def interceptor(
    *, scale: float, scale_sparse: bool = True, seen: set[str] | None = None, joined: bool = True
) -> Callable[..., Any]:
    """Return a function for ``flax.linen.intercept_methods`` that adds the collections ``delta`` and ``support`` to kernels.

    It acts on ``nn.Dense`` and on joint projections; every other module runs as it is. The paths of the kernels it has
    updated are added to ``seen``. Without ``joined`` the kernels of a joint projection are multiplied one by one.
    """

    def intercept(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, names = context.module, getattr(context.module, "joint", None)
        if context.method_name != "__call__" or module.scope is None or not (names or isinstance(module, nn.Dense)):
            return call(*args, **kwargs)
        prefix = "/".join(module.path)
        # A Dense is the joint projection of one kernel which it holds itself.
        read = (
            (lambda kind, name: _variable(module, kind, name))
            if names
            else (lambda kind, _: module.variables.get(kind))
        )
        deltas = [(read("delta", name) or {}).get("kernel", {}) for name in names or ("",)]
        apart = not joined and names and module.has_variable("params", names[0])
        if not any(deltas) and not apart:
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
        if apart:
            return tuple(dense.dense(x, *part, **options) for part in parts)
        outputs = dense.joint_dense(x, *zip(*parts, strict=True), **options)
        return outputs if names else outputs[0]

    return intercept


def _variable(module: nn.Module, collection: str, name: str) -> Any:
    return module.get_variable(collection, name) if module.has_variable(collection, name) else None


def apply(
    model: nn.Module,
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
      model: any Linen module; its kernels with updates must be those of ``nn.Dense`` or of a joint projection.
      params: its params.
      deltas, supports: as from `init`; None for none.
      batch: a mapping becomes keyword arguments of the model, a tuple positional ones, anything else the only one.
      scale: alpha / rank.
      scale_sparse: whether S is scaled too.
      joined: multiply by the kernels of a joint projection at once; not where their outputs are divided over devices, which
        would have to move them.
      **options: passed to ``model.apply``: ``deterministic``, ``rngs``, ``method`` ...

    Returns:
      What the model returns. Differentiable with respect to ``deltas`` alone: no gradient of a kernel is ever formed.

    Raises:
      InputError: an update belongs to no module that takes one; nothing is ignored silently.
    """
    variables = {"params": params, "delta": deltas or {}, "support": supports or {}}
    args, kwargs = (
        ((), dict(batch)) if isinstance(batch, Mapping) else (batch if isinstance(batch, tuple) else (batch,), {})
    )
    if not deltas and joined:
        return model.apply({"params": params}, *args, **kwargs, **options)
    seen: set[str] = set()
    with nn.intercept_methods(interceptor(scale=scale, scale_sparse=scale_sparse, seen=seen, joined=joined)):
        outputs = model.apply(variables, *args, **kwargs, **options)
    _all_seen(kernels(deltas), seen)
    return outputs


def _all_seen(paths: Iterable[str], seen: set[str]) -> None:
    left = [path for path in paths if path not in seen]
    if left:
        raise InputError(
            f"the update of {left[0]!r} reached no nn.Dense or joint projection ({len(left)} such): "
            "take it out of delta.targets, or fold it with materialize"
        )
