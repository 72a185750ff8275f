"""Statistics of the inputs of the kernels of a model, measured on batches of examples."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax import stacks, tree
from dsee_jax.deltas.attach import input_of, intercepted
from dsee_jax.models import INPUTS
from dsee_jax.models.architecture import Model, scans
from dsee_jax.ops.joint import JointDense
from dsee_jax.typing import Array, Module, Params


def gram(model: Module, params: Params, batch: Mapping[str, Array]) -> dict[str, dict[str, jax.Array]]:
    """Return ``{kernel path: {"sum": (in, in), "count": ()}}``: the sum of x x^T over the inputs x of each kernel, float32.

    Padding does not count, nor do rows whose ``weights`` are all 0; prompts count. A kernel counts the positions it is applied
    to: in the last layer of a classifier, the first position only where the others are not computed. An input that belongs to
    no example, such as the embeddings of distances, counts each of its rows once per batch.
    """
    return _summed("bti,btj->ij", model, params, batch)


def squares(model: Module, params: Params, batch: Mapping[str, Array]) -> dict[str, dict[str, jax.Array]]:
    """Return ``{kernel path: {"sum": (in,), "count": ()}}``: the diagonals of the sums of `gram`, computed directly."""
    return _summed("bti,bti->i", model, params, batch)


_squares = jax.jit(squares, static_argnums=0)


def sizes(model: Model, params: Params, batches: Iterable[Mapping[str, Array]]) -> dict[str, jax.Array]:
    """Return ``{kernel path: (in,)}``: the root mean square of each input over all ``batches``, float32.

    All inputs are those of one model, ``params`` as they are: no layer sees the pruning of the layers below it.
    Scanned layers (``model.scan``) run one by one; the result of a stacked kernel is (layers, in).
    """
    stacked = scans(model)
    # Values recorded inside a scanned or rematerialised layer are tracers that leak out of it.
    loops: dict[str, Any] = {name: False for name in ("scan", "remat") if hasattr(model, name)}
    model = model.clone(**loops)
    if stacked:
        params = stacks.unstack(params)
    total: Any = None
    for batch in batches:
        part = _squares(model, params, dict(batch))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    means = {path: jnp.sqrt(part["sum"] / part["count"]) for path, part in total.items()}
    return tree.flatten(stacks.stack(tree.unflatten(means))) if stacked else means


def _summed(
    equation: str, model: Module, params: Params, batch: Mapping[str, Array]
) -> dict[str, dict[str, jax.Array]]:
    sums: dict[str, dict[str, jax.Array]] = {}
    rows = jnp.any(batch["weights"].reshape(len(batch["weights"]), -1) != 0, axis=1)
    real = (batch["attention_mask"] != 0) & rows[:, None]

    def intercept(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        joint = module.joint if isinstance(module, JointDense) else None
        if context.method_name == "__call__" and module.scope is not None and (joint or isinstance(module, nn.Dense)):
            x = input_of(args, kwargs).astype(jnp.float32)
            # An input without an axis of positions is one vector per example.
            x = x if x.ndim == 3 else x[:, None]
            of_examples = len(x) == len(real) and x.shape[1] <= real.shape[1]
            weights = real[:, : x.shape[1], None] if of_examples else jnp.ones((*x.shape[:2], 1))
            weights = weights.astype(jnp.float32)
            total = {"sum": jnp.einsum(equation, x * weights, x, precision="highest"), "count": jnp.sum(weights)}
            for name in joint or ("",):
                path = "/".join(filter(None, (*module.path, name, "kernel")))
                sums[path] = jax.tree.map(jnp.add, sums[path], total) if path in sums else total
        return call(*args, **kwargs)

    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS}
    with intercepted(intercept):
        model.apply({"params": params}, **inputs, deterministic=True)
    return sums
