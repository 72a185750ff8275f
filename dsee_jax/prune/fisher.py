"""The Fisher information of kernels: by how much the loss rises without an entry, on one scale for all kernels.

A kernel W has the outputs ``y = W^T x``. A small change D of W raises the loss of a trained model, whose gradients cancel over
the examples, by about ::

    sum over outputs o of  q_o D_o^T H D_o        H the mean of x x^T over the positions,  q_o the sum of (d loss / d y_o)^2

up to one factor for all kernels. This is the empirical Fisher information as a Kronecker product, diagonal in the outputs
(Martens and Grosse 2015, arXiv 1503.05671, section 3): the gradients of positions count as independent, and the loss as a
log-likelihood. With H alone an output that the loss does not feel counts as much as any other, and kernels cannot be compared.
An entry alone raises the loss by ``q_o W_io^2 H_ii``, by which the entries of all kernels compete here. SparseGPT then chooses
within the blocks of a kernel, by ``q_o W_io^2 / d_i^2``: there the others of an output make up for the entry
(`dsee_jax.prune.reconstruction`).
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import counts, tree
from dsee_jax.auto_axes import auto_sharded, spec
from dsee_jax.deltas.attach import intercepted, linear
from dsee_jax.errors import InputError
from dsee_jax.ops.topk import highest, ordered
from dsee_jax.prune.earlybert import traced_anew
from dsee_jax.runtime import multihost
from dsee_jax.typing import Array, Params

B = TypeVar("B")
"""A batch: a pytree of arrays."""

Losses: TypeAlias = Callable[[Params, B], jax.Array]
"""``(params, batch) -> losses``, an array of any shape, 0 for filler rows, without dropout. It runs the Linen model."""


def outputs(losses: Losses[B], params: Params, paths: Sequence[str], batches: Iterable[B]) -> dict[str, jax.Array]:
    """Return ``{path: (out,)}``: sums of the squared gradients of the losses at the outputs of the kernels, float32.

    The sums are over all positions and examples of ``batches``, and over the calls of a module that is called more than once;
    they do not depend on the sizes of the batches. An output that belongs to no example, such as those of embeddings of
    distances, counts each of its rows once per batch.

    Args:
      losses: of the examples of a batch. Layers may be rematerialised, and not scanned: `dsee_jax.prune.calibration.apart`.
      params: as ``losses`` takes them, updates folded in.
      paths: of kernels (in, out) in ``params``.
      batches: one pass over the calibration examples; batches of equal shapes compile once.

    Raises:
      InputError: there are no batches; a path is not in ``params``, belongs to stacked layers, or no ``nn.Dense`` applies it.
    """
    flat = tree.flatten(params)
    sinks = {path: _sink(path, tree.lookup(flat, path)) for path in paths}
    squares = jax.jit(functools.partial(_squares, losses))
    total: Any = None
    # A jitted function inside of ``losses`` that was traced before has no sinks.
    with traced_anew():
        for batch in batches:
            part = squares(sinks, params, batch)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
    if total is None:
        raise InputError("there are no batches to measure gradients on; expected one or more, with labels")
    return total


def _sink(path: str, w: Array) -> jax.Array:
    if w.ndim != 2:
        raise InputError(
            f"{path!r} has the shape {w.shape}; expected (in, out): the layers of a loop cannot be told apart; run them one "
            "by one (dsee_jax.prune.calibration.apart)"
        )
    return jnp.zeros(w.shape[1], jnp.float32)


def _squares(losses: Losses[B], sinks: Mapping[str, jax.Array], params: Params, batch: B) -> dict[str, jax.Array]:
    met: set[str] = set()

    def total(sinks: Mapping[str, jax.Array]) -> jax.Array:
        inside: set[str] = set()

        def drained(path: str, y: jax.Array) -> jax.Array:
            met.add(path)
            return _drained(y, sinks[path]) if path in sinks else y

        def intercept(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            # A subclass whose method calls that of its parent has one output.
            paths = [path for path in linear(context) if path not in inside]
            inside.update(paths)
            y = call(*args, **kwargs)
            inside.difference_update(paths)
            if not paths:
                return y
            return tuple(map(drained, paths, y)) if isinstance(y, tuple) else drained(paths[0], y)

        with intercepted(intercept):
            return jnp.sum(losses(params, batch), dtype=jnp.float32)

    squares = jax.grad(total)(dict(sinks))
    for path in sinks:
        if path not in met:
            raise InputError(
                f"no nn.Dense applies {path!r}: the gradients at its outputs are unknown; leave it out of the pruned kernels"
            )
    return squares


@jax.custom_vjp
def _drained(y: jax.Array, sink: jax.Array) -> jax.Array:
    """Return ``y``; the gradient with respect to ``sink`` (out,) is the sum of the squares of that of ``y`` (..., out)."""
    return y


def _backward(sink: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    def summed(gradient: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=tuple(range(gradient.ndim - 1)))

    return gradient, auto_sharded(summed, gradient, out=spec(sink))


_drained.defvjp(lambda y, sink: (y, sink), _backward)


def lowest(
    kernels: Mapping[str, Array],
    means: Mapping[str, Array],
    squares: Mapping[str, Array],
    *,
    sparsity: float,
    block: int,
) -> dict[str, np.ndarray]:
    """Return ``{path: (layers..., blocks)}``, int32: how many of the ``round(sparsity * N)`` lowest entries each block has.

    Those of N entries, of all ``kernels`` together, that raise the loss least are the lowest.

    Args:
      kernels: by path the matrices, (layers..., in, out), of any sharding.
      means: the mean squares of their inputs, (layers..., in).
      squares: `outputs` of them, (layers..., out), all of the same losses and examples.
      sparsity: a fraction in [0, 1).
      block: the inputs of a block; the last block of a kernel may have fewer.

    Raises:
      InputError: a kernel has no squares of this shape; or the squares are not finite, or 0 for all kernels.
    """
    for path, w in kernels.items():
        square, shape = squares.get(path), (*w.shape[:-2], w.shape[-1])
        if square is None or tuple(square.shape) != shape:
            raise InputError(
                f"{path!r} needs squares of the shape {shape}, of the gradients at its outputs; found "
                f"{'nothing' if square is None else square.shape}: see dsee_jax.prune.fisher.outputs"
            )
    _check({path: np.asarray(multihost.to_host(squares[path])) for path in kernels})
    ranks = [_ranks(w, means[path], squares[path]) for path, w in kernels.items()]
    every = sum(rank.size for rank in ranks)
    kept = highest(ranks, counts.of(every - round(sparsity * every)))
    return {path: multihost.to_host(_gone(mask, block)) for path, mask in zip(kernels, kept, strict=True)}


def _check(squares: Mapping[str, np.ndarray]) -> None:
    fix = "train the task head first, or prune every kernel alike (scope tensor)"
    for path, square in squares.items():
        if not np.isfinite(square).all():
            raise InputError(f"the gradients at the outputs of {path!r} are not finite: {fix}")
    if squares and not any(square.any() for square in squares.values()):
        raise InputError(f"the gradients at the outputs of all kernels are 0, which tells none of them apart: {fix}")


@jax.jit
def _ranks(w: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
    """Return the `ordered` roots of ``q w^2 E[x^2]`` of all entries; the squares may underflow."""

    def roots(w: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
        return jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(mean)[..., None] * jnp.sqrt(square)[..., None, :]

    return ordered(auto_sharded(roots, w, mean, square, out=spec(w)))


@functools.partial(jax.jit, static_argnums=1)
def _gone(mask: jax.Array, block: int) -> jax.Array:
    """Return the entries of each block (layers..., blocks) that a mask (layers..., in, out) prunes."""

    def by_block(mask: jax.Array) -> jax.Array:
        *layers, inputs, _ = mask.shape
        gone = jnp.sum(~mask, axis=-1, dtype=jnp.int32)
        padded = jnp.pad(gone, [*((0, 0) for _ in layers), (0, -inputs % block)])
        return jnp.sum(padded.reshape(*layers, -1, block), axis=-1, dtype=jnp.int32)

    return auto_sharded(by_block, mask, out=((),) * (mask.ndim - 1))
