"""EarlyBERT (arXiv 2101.00063, section 3): learn a coefficient of every head and neuron, and draw the winning ticket early.

Each unit has one coefficient. All start at 1 and are trained with the weights under an L1 penalty. The units with the smallest
coefficients go::

    context of head h       ->  c_h * context        before the output projection
    activation of neuron f  ->  c_f * activation     after the activation function

Coefficients and the kept units that `draw` returns are trees of the form in `dsee_jax.prune.units`.

The kernels that read the units are those with units along their inputs. They are linear, so a coefficient of a unit is a
coefficient of its rows: `attached` (on activations) and `scaled` (on rows) compute one function. Training uses `attached`,
which forms no gradient of a frozen kernel and also acts on attached updates.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import _global_interceptor_stack  # pyright: ignore[reportPrivateUsage]
from jax.core import Tracer

from dsee_jax import deltas, tree
from dsee_jax.deltas.attach import input_of, intercepted
from dsee_jax.errors import InputError
from dsee_jax.ops.topk import top_k
from dsee_jax.prune import units
from dsee_jax.prune.layers import layer
from dsee_jax.prune.units import count as unit_count
from dsee_jax.typing import Cuts, Masks, Params, Tree

P = TypeVar("P")
"""Params: any pytree of weights."""

_blocks: Any = jax.make_user_context(())
"""The blocks around the code that runs. JAX traces a jitted function again in every other block."""

_numbers = itertools.count()


def init(cuts: Cuts, params: Params) -> dict[str, dict[str, jax.Array]]:
    """Return a coefficient of 1 for every unit of ``params``, float32. A layer without units has no array.

    Args:
      cuts: ``dsee_jax.models.cuts(model)``.
      params: the params of the model; layers may differ in width.

    Raises:
      InputError: as `dsee_jax.prune.units.count`.
    """
    return {
        kind: {
            layer(number): jnp.ones(count, jnp.float32)
            for number, units in enumerate(layers)
            if (count := unit_count(params, units))
        }
        for kind, layers in cuts.items()
    }


def scaled(params: P, coefficients: Tree, cuts: Cuts) -> P:
    """Return params in which the rows of every unit, in the kernels that read the unit, are multiplied by its coefficient.

    Differentiable in both trees. Kept units (bool) serve as coefficients too: the rows of pruned units become zeros.

    Raises:
      InputError: a coefficient belongs to no unit, or the numbers of coefficients and units differ.
    """
    flat, rows = tree.flatten(params), {}
    for path, factors in _factors(coefficients, cuts).items():
        w = tree.lookup(flat, path)
        _check(path, factors, w.shape[0])
        rows[path] = (w * factors.reshape(-1, *[1] * (w.ndim - 1))).astype(w.dtype)
    return tree.replace(params, rows)


@contextlib.contextmanager
def traced_anew() -> Iterator[None]:
    """Trace jitted functions in the block again, as their cached programs lack its interceptors or have those of others."""
    with _blocks((*_blocks.value, next(_numbers))):
        yield


@contextlib.contextmanager
def attached(coefficients: Tree, cuts: Cuts) -> Iterator[None]:
    """Multiply units by their coefficients in every Linen model that runs in this context; computes the function of `scaled`.

    The inputs of each ``nn.Dense`` and ``nn.DenseGeneral`` (Flax's attention) whose kernel reads the units are multiplied
    before attached updates read them: enter this block before that of `dsee_jax.attached`. An empty tree changes nothing. A
    jitted function that is called in the block is compiled anew for every block.

    A leaf may also be (rows, units): a coefficient of each unit for each row of the batch, whose gradients are those of the
    rows apart.

    Raises:
      InputError: a coefficient belongs to no unit or reached no linear module, the
        numbers of coefficients and units differ, or updates are attached already.
    """
    if any(getattr(each, "__module__", None) == deltas.attached.__module__ for each in _global_interceptor_stack):
        raise InputError(
            "the block of coefficients is inside of a block of updates, which would read the inputs before they are "
            "multiplied: enter it before dsee_jax.attached"
        )
    factors, seen = _factors(coefficients, cuts), set[str]()

    def intercept(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if (
            context.method_name != "__call__"
            or not isinstance(module, (nn.Dense, nn.DenseGeneral))
            or module.scope is None
        ):
            return call(*args, **kwargs)
        path = "/".join((*module.path, "kernel"))
        if path not in factors:
            return call(*args, **kwargs)
        seen.add(path)
        x = input_of(args, kwargs)
        axes = getattr(module, "axis", -1)
        # The units are along the first input axis of the kernel.
        units = min(axis % x.ndim for axis in ([axes] if isinstance(axes, int) else axes))
        _check(path, factors[path], x.shape[units])
        *rows, inputs = factors[path].shape
        sizes = {0: rows[0] if rows else 1, units: inputs}
        wide = factors[path].reshape([sizes.get(axis, 1) for axis in range(x.ndim)])
        # The product and the sum in its gradient are float32: bfloat16 rounds 0.999 to 1.
        return call((x * wide).astype(x.dtype), *args[1:])

    with traced_anew() if factors else contextlib.nullcontext(), intercepted(intercept):
        yield
    for path in sorted(factors.keys() - seen):
        raise InputError(
            f"the coefficients of {path!r} reached no nn.Dense and no nn.DenseGeneral: call the "
            "part of the model that holds the module, or multiply the weights instead (scaled)"
        )


def penalty(coefficients: Tree) -> jax.Array:
    """Return the sum of ``|c|`` over all coefficients, float32 of shape (): the term that lambda multiplies."""
    return jnp.asarray(sum(jnp.sum(jnp.abs(c)) for c in jax.tree.leaves(coefficients)), jnp.float32)


def draw(
    coefficients: Tree,
    *,
    heads: int | float = 0,
    neurons: int | float = 0,
    signed: bool = False,
    uniform: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """Return the kept units: those with the largest coefficients, heads within each layer, neurons over all layers.

    Args:
      coefficients: as from `init`.
      heads: the heads of each layer to prune: a fraction in [0, 1), rounded to the nearest whole number, or a whole number
        (an int). The paper prunes a third.
      neurons: the neurons of all layers together to prune, likewise. The paper prunes 0.4.
      signed: compare ``c``, as the authors' code does, instead of ``|c|``.
      uniform: compare and count neurons within each layer too, which gives layers of equal widths.

    Returns:
      A tree like ``coefficients``, bool, True = kept: an input of `dsee_jax.prune.units.masks` and of
      `dsee_jax.prune.compaction`. The counts are exact. Of units with equal coefficients those of the lowest layer and index
      are kept.

    Raises:
      InputError: as `dsee_jax.prune.units.removal_count`; or the coefficients are traced.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(coefficients)):
        raise InputError(
            "the coefficients are traced; draw returns NumPy arrays: call it outside of jax.jit, on the coefficients that the "
            "step returns"
        )
    kept: dict[str, dict[str, np.ndarray]] = {}
    for kind, amount in (("heads", heads), ("neurons", neurons)):
        layers = coefficients.get(kind, {})
        # In the order of the layers: layer_2 before layer_10.
        names = sorted(layers, key=lambda name: (len(name), name))
        together = kind == "neurons" and not uniform
        for pool in filter(None, [names] if together else [[name] for name in names]):
            joined = jnp.concatenate([layers[name] for name in pool])
            left = joined.size - units.removal_count(kind, amount, joined.size)
            flags = np.asarray(top_k(joined if signed else jnp.abs(joined), left))
            ends = np.cumsum([layers[name].size for name in pool])[:-1]
            kept.setdefault(kind, {}).update(zip(pool, np.split(flags, ends), strict=True))
    return kept


def distance(a: Masks, b: Masks) -> dict[str, float]:
    """Return ``{kind: fraction}`` of the units on which two results of `draw` differ.

    This is the Hamming distance over the number of units of the kind, in [0, 1].
    """
    return {
        kind: sum(np.count_nonzero(a[kind][name] != b[kind][name]) for name in layers)
        / sum(keep.size for keep in layers.values())
        for kind, layers in a.items()
        if layers
    }


def settled(distances: Sequence[Mapping[str, float]], *, tolerance: float, patience: int) -> bool:
    """Return whether the last ``patience`` distances between consecutive masks are all under ``tolerance``.

    This is the early-bird test. ``patience`` is 1 or more; with a tolerance of 0 the mask never settles.
    """
    last = distances[-patience:]
    return len(last) == patience and all(fraction < tolerance for each in last for fraction in each.values())


def summary(coefficients: Tree) -> dict[str, dict[str, list[float]]]:
    """Return a summary of coefficients for the log, as JSON values.

    Heads keep every coefficient. Of the neurons of each layer there are the quantiles 0, 1/4, 1/2, 3/4 and 1.
    """
    return {
        kind: {
            name: np.round(c if kind == "heads" else np.quantile(c, (0, 0.25, 0.5, 0.75, 1)), 7).tolist()
            for name, c in layers.items()
        }
        for kind, layers in coefficients.items()
    }


def packed(kept: Masks) -> dict[str, dict[str, str]]:
    """Return kept units as JSON values: hexadecimal, one bit per unit, the first unit in the highest bit of its byte."""
    return {
        kind: {name: np.packbits(np.asarray(keep)).tobytes().hex() for name, keep in layers.items()}
        for kind, layers in kept.items()
    }


def _factors(coefficients: Tree, cuts: Cuts) -> dict[str, jax.Array]:
    """Return the factors (in,) of the rows of every kernel that reads units, by path."""
    factors: dict[str, jax.Array] = {}
    for kind, layers in coefficients.items():
        by_layer = {layer(number): units for number, units in enumerate(cuts.get(kind, ()))}
        for name, c in layers.items():
            if name not in by_layer:
                raise InputError(f"the coefficients of {kind} of {name} belong to no unit of this model")
            for path, (axis, entries) in by_layer[name].axes.items():
                if axis == 0 and path.endswith("/kernel"):
                    factors[path] = jnp.repeat(jnp.asarray(c), entries, axis=-1)
    return factors


def _check(path: str, factors: jax.Array, inputs: int) -> None:
    if factors.shape[-1] != inputs:
        raise InputError(f"{path!r} has {inputs} inputs and the coefficients of its units are for {factors.shape[-1]}")
