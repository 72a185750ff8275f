"""EarlyBERT (arXiv 2101.00063, section 3): learn how much each head and each neuron matters, and draw the ticket early.

One coefficient a unit, all 1 at the start, trained with the weights under an L1 penalty; the units with the smallest go::

    context of head h       ->  c_h * context        before the output projection
    activation of neuron f  ->  c_f * activation     after the activation function

Coefficients, and the units that `draw` keeps of them, are trees of the form that `dsee_jax.prune.units` gives units::

    {"heads": {"layer_0": (heads,), ...}, "neurons": {"layer_0": (neurons,), ...}}

The kernels that read the units are those cut along their inputs. They are linear, so a coefficient on a unit is a coefficient
on its rows: `attached` (on activations) and `scaled` (on rows) compute one function. `attached` forms no gradient of a frozen
kernel and reaches updates too; it is what training uses.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.ops.topk import top_k
from dsee_jax.prune import units
from dsee_jax.prune.units import count as unit_count
from dsee_jax.prune.units import layer
from dsee_jax.typing import Cuts, Masks, Params, Tree


def init(cuts: Cuts, params: Params) -> dict[str, dict[str, jax.Array]]:
    """Return a coefficient of 1 for every unit of ``params``, float32; layers may differ, one without units gets no array.

    ``cuts`` is ``dsee_jax.models.cuts(model)``. Raises `InputError` as `dsee_jax.prune.units.count` does.
    """
    return {
        kind: {
            layer(number): jnp.ones(count, jnp.float32)
            for number, units in enumerate(layers)
            if (count := unit_count(params, units))
        }
        for kind, layers in cuts.items()
    }


def scaled(params: Params, coefficients: Tree, cuts: Cuts) -> dict[str, Any]:
    """Return params whose units are multiplied by their coefficients, in the rows of the kernels that read them.

    Differentiable in both trees. bool coefficients are masks: what `draw` takes away has rows of zeros.

    Raises:
      InputError: a coefficient is of no unit, or there are more or fewer than units.
    """
    flat = tree.flatten(params)
    for path, factors in _factors(coefficients, cuts).items():
        w = tree.get(params, path)
        _check(path, factors, w.shape[0])
        flat[path] = (w * factors[:, None]).astype(w.dtype)
    return tree.unflatten(flat)


@contextlib.contextmanager
def attached(coefficients: Tree, cuts: Cuts) -> Iterator[None]:
    """Multiply units by their coefficients in the Linen model that runs within; see `scaled` for what it computes.

    The inputs of each ``nn.Dense`` whose kernel reads the units are multiplied, before updates attached with
    `dsee_jax.deltas.apply` see them. An empty tree changes nothing.

    Raises:
      InputError: a coefficient is of no unit or reached no ``nn.Dense``, or there are more or fewer than units.
    """
    every, seen = _factors(coefficients, cuts), set[str]()

    def intercept(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense) or module.scope is None:
            return call(*args, **kwargs)
        path = "/".join((*module.path, "kernel"))
        if path not in every:
            return call(*args, **kwargs)
        seen.add(path)
        x, *rest = args
        _check(path, every[path], x.shape[-1])
        factors = every[path].reshape((1,) * (x.ndim - 1) + (-1,))
        # In float32, and so the sum that is its gradient: bfloat16 would take 0.999 for 1.
        return call((x * factors).astype(x.dtype), *rest, **kwargs)

    with nn.intercept_methods(intercept):
        yield
    for path in sorted(every.keys() - seen):
        raise InputError(f"the coefficients of {path!r} reached no nn.Dense: multiply the weights instead (scaled)")


def penalty(coefficients: Tree) -> jax.Array:
    """Return the sum of ``|c|`` over all coefficients, float32 of shape (): the term that lambda multiplies."""
    return jnp.asarray(sum(jnp.sum(jnp.abs(c)) for c in jax.tree.leaves(coefficients)), jnp.float32)


def draw(
    coefficients: Tree, *, heads: int | float = 1 / 3, neurons: int | float = 0.4, signed: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Return the units to keep: those with the largest coefficients, heads within each layer, neurons over the model.

    Args:
      coefficients: as from `init`.
      heads: how many of each layer go: a fraction in [0, 1), of which the nearest whole number is taken, or an int.
      neurons: how many of the whole model go, the same.
      signed: compare ``c`` itself, as the authors' code does, and not ``|c|``.

    Returns:
      A tree like ``coefficients``, bool, True = kept: an input of `dsee_jax.prune.units.masks` and of
      `dsee_jax.prune.compaction`. The counts are exact; of equal coefficients those of the lowest layer and index are kept.

    Raises:
      InputError: as `dsee_jax.prune.going`.
    """
    kept: dict[str, dict[str, np.ndarray]] = {}
    for kind, amount in (("heads", heads), ("neurons", neurons)):
        layers = coefficients.get(kind, {})
        # As numbers: layer_2 before layer_10.
        names = sorted(layers, key=lambda name: (len(name), name))
        for pool in filter(None, [names] if kind == "neurons" else [[name] for name in names]):
            joined = jnp.concatenate([layers[name] for name in pool])
            left = joined.size - units.going(kind, amount, joined.size)
            flags = np.asarray(top_k(joined if signed else jnp.abs(joined), left))
            ends = np.cumsum([layers[name].size for name in pool])[:-1]
            kept.setdefault(kind, {}).update(zip(pool, np.split(flags, ends), strict=True))
    return kept


def distance(a: Masks, b: Masks) -> dict[str, float]:
    """Return ``{kind: fraction}``: of the heads, and of the neurons, those that one keeps and the other does not.

    The Hamming distance of two results of `draw`, over the number of units: in [0, 1].
    """
    return {
        kind: sum(np.count_nonzero(a[kind][name] != b[kind][name]) for name in layers)
        / sum(keep.size for keep in layers.values())
        for kind, layers in a.items()
        if layers
    }


def settled(distances: Sequence[Mapping[str, float]], *, tolerance: float, patience: int) -> bool:
    """Tell whether the mask stopped moving: the last ``patience`` distances of consecutive checks are all under ``tolerance``.

    The early-bird test. ``patience`` is 1 or more; with a tolerance of 0 the mask never settles.
    """
    last = distances[-patience:]
    return len(last) == patience and all(found < tolerance for each in last for found in each.values())


def summary(coefficients: Tree) -> dict[str, dict[str, list[float]]]:
    """Return what a log keeps of coefficients: those of all heads, and of the neurons of each layer five quantiles.

    The quantiles are the smallest, 1/4, 1/2, 3/4 and the largest; JSON values.
    """
    return {
        kind: {
            name: np.round(c if kind == "heads" else np.quantile(c, (0, 0.25, 0.5, 0.75, 1)), 7).tolist()
            for name, c in layers.items()
        }
        for kind, layers in coefficients.items()
    }


def packed(kept: Masks) -> dict[str, dict[str, str]]:
    """Return units, as from `draw`, as JSON values: a bit each, the first the highest of its byte, in hexadecimal."""
    return {
        kind: {name: np.packbits(np.asarray(keep)).tobytes().hex() for name, keep in layers.items()}
        for kind, layers in kept.items()
    }


def _factors(coefficients: Tree, cuts: Cuts) -> dict[str, jax.Array]:
    """One factor a row, by the path of the kernel whose rows they are."""
    found: dict[str, jax.Array] = {}
    for kind, layers in coefficients.items():
        known = {layer(number): units for number, units in enumerate(cuts.get(kind, ()))}
        for name, c in layers.items():
            if name not in known:
                raise InputError(f"the coefficients of {kind} of {name} are of no unit of this model")
            for path, (axis, entries) in known[name].axes.items():
                if axis == 0 and path.endswith("/kernel"):
                    found[path] = jnp.repeat(jnp.asarray(c), entries)
    return found


def _check(path: str, factors: jax.Array, inputs: int) -> None:
    if factors.size != inputs:
        raise InputError(f"{path!r} has {inputs} inputs and the coefficients of its units are for {factors.size}")
