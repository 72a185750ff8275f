"""Low-rank + sparse updates of frozen kernels (DSEE, arXiv 2111.00160, section 3): create, attach, fold, count.

    W_eff = W + scale * (A @ B + scatter(support, values))

Before and after, for one kernel of a model that was never edited::

    params    query/kernel (768, 768)                        frozen
    deltas    query/kernel/{a (768, 16), b (16, 768), values (64,)}   trained
    supports  query/kernel (64, 2)                           int32, fixed

`apply` runs a Linen model with its updates attached: they travel as the collections ``delta`` and ``support``, and an
interceptor reads them at each ``nn.Dense`` and at each joint projection (a module with an attribute ``joint`` that names
the children which hold the kernels). For code that is not Linen, `materialize` gives plain params.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from dsee_jax import ops, stacks, tree
from dsee_jax.aliases import Array, Delta, Deltas, Key, Params, Supports
from dsee_jax.config import DeltaConfig
from dsee_jax.errors import InputError
from dsee_jax.supports import SUPPORTS

SCALE = 2.0
"""alpha / rank of the authors' settings (32 / 16), the default of `DeltaConfig`; pass ``config.scale`` for any other."""

_PARTS = frozenset({"a", "b", "values"})

_AT_ONCE = 1 << 28
"""Bytes of float32 kernels whose supports are chosen in one call: all query and value kernels of a RoBERTa-large, and of a
larger model no more than leaves room for the copies that the selectors make."""


def _is_delta(node: Any) -> bool:
    return (
        isinstance(node, Mapping) and bool(node) and _PARTS.issuperset(node) and not isinstance(_first(node), Mapping)
    )


def _first(node: Mapping[str, Any]) -> Any:
    return next(iter(node.values()))


def kernels(deltas: Deltas | None) -> dict[str, Delta]:
    """Return ``{kernel path: delta}``, paths sorted at every level."""
    return tree.flatten(deltas, is_leaf=_is_delta) if deltas else {}


def count(deltas: Deltas | None) -> int:
    """Return how many numbers the updates train (coordinates are not trained and not counted)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(deltas))


def init(params: Params, config: DeltaConfig, *, key: Key) -> tuple[dict[str, Any], dict[str, Any]]:
    """Create the updates of every kernel that ``config.targets`` selects; the start equals the pretrained model exactly.

    ``a`` (in, rank) is normal with standard deviation 0.02; ``b`` (rank, out) and ``values`` (nonzeros,) are 0. Supports are
    chosen from the pretrained kernels, those of one shape in one vmapped call (many large ones in several). Kernels with a
    leading layer axis (scanned models) get stacked updates, each layer's what it would be by itself.

    Args:
      params: the pretrained tree; targets must be floating kernels of two axes (in, out), or three (layers, in, out).
      config: targets, rank, nonzeros, support.
      key: decides ``a`` and the random choices of the selectors; folded with the index of the kernel among the targets,
        those of scanned models taken layer by layer.

    Returns:
      ``(deltas, supports)``; both empty when rank and nonzeros are 0.

    Raises:
      InputError: a target matches nothing or no kernel, or rank or nonzeros do not fit it.
    """
    if not config.rank and not config.nonzeros:
        return {}, {}
    flat = tree.flatten(params)
    chosen = {path: flat[path] for path in tree.select(config.targets, flat)}
    for path, w in chosen.items():
        _check(path, w, config)
    keys = _keys(chosen, key)
    deltas: dict[str, Array] = {}
    for path, w in chosen.items():
        *layers, rows, columns = w.shape
        if config.rank:
            normal = functools.partial(jax.random.normal, shape=(rows, config.rank), dtype=jnp.float32)
            a = 0.02 * jax.vmap(normal)(keys[path])
            deltas[f"{path}/a"] = a if layers else a[0]
            deltas[f"{path}/b"] = jnp.zeros((*layers, config.rank, columns), jnp.float32)
        if config.nonzeros:
            deltas[f"{path}/values"] = jnp.zeros((*layers, config.nonzeros), jnp.float32)
    supports = _supports(chosen, keys, config) if config.nonzeros else {}
    return tree.unflatten(deltas), tree.unflatten(supports)


def _keys(chosen: Mapping[str, Array], key: Key) -> dict[str, Key]:
    """Return the keys (layers,) of every kernel; a kernel of two axes is one layer."""

    def layers(path: str, w: Array) -> list[str]:
        found = stacks.paths(path, w.shape[0]) if w.ndim == 3 else [path]
        # One that is stacked under another name than `stacks.STACK` still needs a key a layer.
        return [f"{path}/{n:09}" for n in range(w.shape[0])] if w.ndim == 3 and found == [path] else found

    names = {path: layers(path, w) for path, w in chosen.items()}
    order = tree.flatten(tree.unflatten({name: 0 for each in names.values() for name in each}))
    numbers = {name: number for number, name in enumerate(order)}
    return {
        path: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.array([numbers[name] for name in each]))
        for path, each in names.items()
    }


def _check(path: str, w: Array, config: DeltaConfig) -> None:
    if w.ndim not in (2, 3) or not jnp.issubdtype(w.dtype, jnp.floating):
        raise InputError(f"delta.targets takes {path!r}, which is {w.dtype}{w.shape}; expected a kernel (in, out)")
    rows, columns = w.shape[-2:]
    if not 0 <= config.rank <= min(rows, columns):
        raise InputError(f"delta.rank is {config.rank}; {path!r} is {rows} x {columns}: use 0 to {min(rows, columns)}")
    if not 0 <= config.nonzeros <= rows * columns:
        raise InputError(
            f"delta.nonzeros is {config.nonzeros}; {path!r} has {rows} x {columns} = {rows * columns} entries: use fewer"
        )


def _pick(select: Callable[..., jax.Array], nonzeros: int, options: Mapping[str, Any], w: Array, key: Key) -> jax.Array:
    return select(w, nonzeros, key=key, **options)


def _supports(chosen: Mapping[str, Array], keys: Mapping[str, Key], config: DeltaConfig) -> dict[str, Array]:
    select = SUPPORTS[config.support]
    options = {"rank": config.support_rank} if config.support == "grebsmo" else {}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for path, w in chosen.items():
        by_shape.setdefault(w.shape, []).append(path)
    found: dict[str, Array] = {}
    for shape, paths in by_shape.items():
        # One matrix an index: a stacked kernel counts as as many matrices as it has layers.
        stacked = jnp.concatenate([jnp.reshape(chosen[path], (-1, *shape[-2:])) for path in paths])
        layers = stacked.shape[0] // len(paths)
        split = jax.vmap(lambda each: jax.random.split(each, 1)[0])(jnp.concatenate([keys[path] for path in paths]))
        pick = jax.vmap(functools.partial(_pick, select, config.nonzeros, options))
        at_once = max(1, _AT_ONCE // (4 * shape[-2] * shape[-1]))
        parts = [slice(start, start + at_once) for start in range(0, len(stacked), at_once)]
        picked = jnp.concatenate([jax.block_until_ready(pick(stacked[part], split[part])) for part in parts])
        for number, path in enumerate(paths):
            part = picked[number * layers : (number + 1) * layers]
            found[path] = part if len(shape) == 3 else part[0]
    return found


def effective(w: Array, delta: Delta, support: Array | None, *, scale: float, scale_sparse: bool = True) -> jax.Array:
    """Return ``w + scale * (a @ b + S)`` for one kernel (in, out) or a stack of them (layers, in, out), in ``w``'s dtype.

    The sum is taken in float32 (float64 for a float64 kernel). With ``scale_sparse`` false S is added unscaled.
    """
    if w.ndim > 2:
        return jax.vmap(lambda w, d, s: effective(w, d, s, scale=scale, scale_sparse=scale_sparse))(w, delta, support)
    total = jnp.asarray(w, jnp.promote_types(w.dtype, jnp.float32))
    if "a" in delta:
        total = total + scale * jnp.matmul(delta["a"], delta["b"], precision="highest")
    if "values" in delta:
        if support is None:
            raise InputError("a delta has values and no support: pass the supports that were made with it")
        total = total.at[support[:, 0], support[:, 1]].add((scale if scale_sparse else 1.0) * delta["values"])
    return total.astype(w.dtype)


def updates(
    w: Array, delta: Delta | None, support: Array | None, *, scale: float, scale_sparse: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Return ``scale * a @ b`` and ``scale * (a @ b + S)``, shaped like the kernel ``w``; zeros where there is no delta."""
    zeros = jnp.zeros(w.shape)
    if delta is None:
        return zeros, zeros
    factors = {name: delta[name] for name in ("a", "b") if name in delta}
    whole = effective(zeros, delta, support, scale=scale, scale_sparse=scale_sparse)
    return effective(zeros, factors, None, scale=scale), whole


def materialize(
    params: Params, deltas: Deltas | None, supports: Supports | None, *, scale: float = SCALE, scale_sparse: bool = True
) -> dict[str, Any]:
    """Return plain params with every update folded into its kernel; equal to `apply` up to rounding.

    Args:
      params: the tree that holds the kernels, of any framework whose params are nested dicts.
      deltas: updates at some of its paths, or None.
      supports: coordinates of the sparse updates, or None when there are none.
      scale: alpha / rank.
      scale_sparse: whether S is scaled too.

    Raises:
      InputError: a path of ``deltas`` is not in ``params``.
    """
    flat, coordinates = tree.flatten(params), tree.flatten(supports or {})
    for path, delta in kernels(deltas).items():
        w = tree.get(params, path)
        flat[path] = effective(w, delta, coordinates.get(path), scale=scale, scale_sparse=scale_sparse)
    return tree.unflatten(flat)


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
            return tuple(ops.dense(x, *part, **options) for part in parts)
        outputs = ops.joint_dense(x, *zip(*parts, strict=True), **options)
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
