"""What goes into the kernels of a model: sums over the inputs of all that multiply, on batches of examples."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax import stacks, tree
from dsee_jax.models import INPUTS
from dsee_jax.typing import Array, Params


def gram(model: nn.Module, params: Params, batch: Mapping[str, Array]) -> dict[str, dict[str, jax.Array]]:
    """Return ``{kernel path: {"sum": (in, in), "count": ()}}``: the sum of x x^T over the inputs x of each kernel, float32.

    Inputs at padding, and of rows whose ``weights`` are all 0, do not count; those of prompts do. A
    kernel sees what the model computes: where the last layer of a classifier goes on with the first position only, so does
    the sum. An input that is of no example, as embeddings of distances, counts each of its rows once a batch.
    """
    return _summed("bti,btj->ij", model, params, batch)


def squares(model: nn.Module, params: Params, batch: Mapping[str, Array]) -> dict[str, dict[str, jax.Array]]:
    """Return ``{kernel path: {"sum": (in,), "count": ()}}``: the diagonal of what `gram` sums, which is never formed."""
    return _summed("bti,bti->i", model, params, batch)


_squares = jax.jit(squares, static_argnums=0)


def sizes(model: nn.Module, params: Params, batches: Iterable[Mapping[str, Array]]) -> dict[str, jax.Array]:
    """Return ``{kernel path: (in,)}``: the root mean square of each input over all ``batches``, float32.

    Layers that are scanned (``model.scan``) are run one by one; of their stacked kernels the result is (layers, in).
    """
    stacked = getattr(model, "scan", False)
    # What is seen inside a loop or a recomputed layer does not outlive it.
    loops: dict[str, Any] = {name: False for name in ("scan", "remat") if hasattr(model, name)}
    model = model.clone(**loops)
    if stacked:
        params = stacks.unstack(params)
    total: Any = None
    for batch in batches:
        part = _squares(model, params, dict(batch))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    found = {path: jnp.sqrt(part["sum"] / part["count"]) for path, part in total.items()}
    return tree.flatten(stacks.stack(tree.unflatten(found))) if stacked else found


def _summed(
    equation: str, model: nn.Module, params: Params, batch: Mapping[str, Array]
) -> dict[str, dict[str, jax.Array]]:
    found: dict[str, dict[str, jax.Array]] = {}
    rows = jnp.any(batch["weights"].reshape(len(batch["weights"]), -1) != 0, axis=1)
    real = (batch["attention_mask"] != 0) & rows[:, None]

    def intercept(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        joint = getattr(module, "joint", None)
        if context.method_name == "__call__" and module.scope is not None and (joint or isinstance(module, nn.Dense)):
            x = args[0].astype(jnp.float32)
            # What has no axis of positions is one vector of the whole example.
            x = x if x.ndim == 3 else x[:, None]
            of_examples = len(x) == len(real) and x.shape[1] <= real.shape[1]
            weights = real[:, : x.shape[1], None] if of_examples else jnp.ones((*x.shape[:2], 1))
            weights = weights.astype(jnp.float32)
            total = {"sum": jnp.einsum(equation, x * weights, x, precision="highest"), "count": jnp.sum(weights)}
            for name in joint or ("",):
                path = "/".join(filter(None, (*module.path, name, "kernel")))
                found[path] = jax.tree.map(jnp.add, found[path], total) if path in found else total
        return call(*args, **kwargs)

    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS}
    with nn.intercept_methods(intercept):
        model.apply({"params": params}, **inputs, deterministic=True)
    return found
