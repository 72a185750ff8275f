"""The Fisher information of kernels: by how much the loss rises without an entry, on one scale for all kernels.

A kernel W has the outputs ``y = W^T x``. Of a trained model, whose gradients cancel over the examples, a small change D of W
raises the loss by half of ::

    sum over outputs o of  q_o D_o^T H D_o        H the mean of x x^T over the positions,  q_o the sum of (d loss / d y_o)^2

the empirical Fisher information as a Kronecker product, diagonal in the outputs (Martens and Grosse 2015, arXiv 1503.05671,
section 3; the gradients of positions count as independent). With H alone an output that the loss does not feel counts as much
as any other, and kernels cannot be compared. An entry alone raises the loss by half of ``q_o W_io^2 H_ii``, by which the
entries of all kernels compete here. SparseGPT then chooses within the blocks of a kernel, by ``q_o W_io^2 / d_i^2``: there the
others of an output make up for the entry (`dsee_jax.prune.reconstruction`).
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import counts
from dsee_jax.deltas.attach import intercepted, linear
from dsee_jax.errors import InputError
from dsee_jax.ops.topk import highest, ordered
from dsee_jax.typing import Array, Params

B = TypeVar("B")
"""A batch: a pytree of arrays."""

Losses = Callable[[Params, B], jax.Array]
"""``(params, batch) -> losses``, of any shape and of weight 0 for filler rows, without dropout. It runs the Linen model."""


def outputs(losses: Losses[B], params: Params, batches: Iterable[B]) -> dict[str, jax.Array]:
    """Return ``{kernel path: (out,)}``: sums of the squared gradients of the losses at the outputs of each kernel, float32.

    The sums are over all positions and examples of ``batches``, and do not depend on the sizes of the batches. The outputs of
    a module that is called more than once count at each call.

    Args:
      losses: of the examples of a batch, by themselves; layers that are scanned or rematerialised have no outputs here.
      params: as ``losses`` takes them, updates folded in.
      batches: one pass over the calibration examples; batches of equal shapes compile once.

    Raises:
      InputError: there are no batches.
    """
    squares = jax.jit(functools.partial(_squares, losses))
    total: Any = None
    for batch in batches:
        part = squares(params, batch)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    if total is None:
        raise InputError("there are no batches to measure gradients on; expected one or more, with labels")
    return total


def _squares(losses: Losses[B], params: Params, batch: B) -> dict[str, jax.Array]:
    shapes: dict[str, list[jax.ShapeDtypeStruct]] = {}

    def total(noise: Mapping[str, list[jax.Array]] | None) -> jax.Array:
        """Return the sum of the losses with ``noise`` added to the outputs of each call; None: note their shapes."""
        calls = dict.fromkeys(noise or (), 0)

        def moved(path: str, y: jax.Array) -> jax.Array:
            if noise is None:
                shapes.setdefault(path, []).append(jax.ShapeDtypeStruct(y.shape, y.dtype))
                return y
            calls[path] += 1
            return y + noise[path][calls[path] - 1]

        def intercept(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            y, paths = call(*args, **kwargs), linear(context)
            if not paths:
                return y
            if isinstance(y, tuple):
                return tuple(map(moved, paths, y))
            return moved(paths[0], y)

        with intercepted(intercept):
            return jnp.sum(losses(params, batch), dtype=jnp.float32)

    jax.eval_shape(lambda: total(None))
    gradients = jax.grad(total)(jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes))

    def squared(gradient: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=tuple(range(gradient.ndim - 1)))

    return {path: sum(map(squared, of_calls), jnp.float32(0)) for path, of_calls in gradients.items()}


def lowest(
    kernels: Mapping[str, Array],
    means: Mapping[str, Array],
    squares: Mapping[str, Array],
    *,
    sparsity: float,
    block: int,
) -> dict[str, np.ndarray]:
    """Return ``{path: (layers..., blocks)}``, int32: the entries of each block among the ``round(sparsity * N)`` that go.

    Those that raise the loss least go, of the N entries of all ``kernels`` together.

    Args:
      kernels: by path the matrices, (layers..., in, out).
      means: the mean squares of their inputs, (layers..., in).
      squares: `outputs` of them, (layers..., out).
      sparsity: a fraction in [0, 1).
      block: the inputs of a block; the last block of a kernel may have fewer.

    Raises:
      InputError: a kernel has no squares of this shape.
    """
    ranks: list[jax.Array] = []
    for path, w in kernels.items():
        square, shape = squares.get(path), (*w.shape[:-2], w.shape[-1])
        if square is None or tuple(square.shape) != shape:
            raise InputError(
                f"{path!r} needs squares of the shape {shape}, of the gradients at its outputs; found "
                f"{'nothing' if square is None else square.shape}: pass "
                "squares=dsee_jax.prune.fisher.outputs(losses, params, batches)"
            )
        ranks.append(_ranks(w, means[path], square))
    every = sum(rank.size for rank in ranks)
    kept = highest(ranks, counts.of(every - round(sparsity * every)))
    gone: dict[str, np.ndarray] = {}
    for path, mask in zip(kernels, kept, strict=True):
        *layers, inputs, _ = mask.shape
        by_input = np.asarray(jnp.sum(~mask, axis=-1, dtype=jnp.int32))
        padded = np.pad(by_input, [*((0, 0) for _ in layers), (0, -inputs % block)])
        gone[path] = padded.reshape(*layers, -1, block).sum(-1, dtype=np.int32)
    return gone


@jax.jit
def _ranks(w: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
    """Return the `ordered` roots of ``q w^2 E[x^2]`` of all entries: squares of small numbers are 0 in float32."""
    return ordered(jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(mean)[..., None] * jnp.sqrt(square)[..., None, :])
