"""SparseGPT: pruning that changes the weights that stay, so that the outputs of a kernel change least.

Frantar and Alistarh 2023 (arXiv 2301.00774, section 3). With the mean H of x x^T over the inputs x of a kernel W, the error of
other weights V is ``trace((V - W)^T H (V - W))``, the mean square of the change of the output. An update D of the kernel is
the same before and after and cancels: W is pruned, and D is kept beside it. D was trained beside the former weights, so the
updates are tuned again afterwards.

The authors prune every kernel alike, as H says nothing of the loss. With the gradients at the outputs
(`dsee_jax.prune.fisher`) the entries of all kernels compete. The weights that stay have the same solution then, as the outputs
of a kernel are independent.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import orientation, tree
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.errors import InputError
from dsee_jax.ops.topk import n_m, top_k
from dsee_jax.prune import fisher
from dsee_jax.prune.weights import Kernel, Selected, selected
from dsee_jax.runtime import multihost
from dsee_jax.typing import Array, Params, Rules

BLOCK, DAMPING = 128, 0.01
"""The inputs whose entries compete at a time, and the damping, relative to the mean of the diagonal of H, of the authors."""


def sparsegpt(
    params: Params,
    adapter: Adapter | None,
    rules: Rules | Sequence[str],
    *,
    grams: Mapping[str, Array],
    squares: Mapping[str, Array] | None = None,
    sparsity: float = 0.5,
    n: int = 0,
    m: int = 0,
    damping: float = DAMPING,
) -> tuple[dict[str, Any], Params]:
    """Return masks, and params with the pruned weights at 0 and the others changed to make up for them.

    Without ``squares``, exactly ``round(sparsity * N)`` of the N entries of each kernel go: those of the lowest ``w^2 / d^2``
    within a block of `BLOCK` inputs, over all outputs, as by the authors. With ``squares``, the entries of all kernels compete
    by the rise of the loss (`dsee_jax.prune.fisher`). That says how many go of each block, exactly ``round(sparsity * N)`` of
    all N; within the block those of the lowest ``q w^2 / d^2`` go. Or, with ``m``, all but ``n`` of every ``m`` consecutive
    inputs. Entries that are 0 already go first and stay 0, also where more of them are in a block than go. The weights that
    stay are computed on one device, one kernel after the other; the function does not work under ``jax.jit``.

    Args:
      params: any pytree of weights.
      adapter: the updates beside them, which stay as they are; None for none.
      rules: as in `dsee_jax.prune.unstructured`; the mapping of a rule may hold ``sparsity``, ``n``, ``m`` and
        ``orientation``. Kernels of one pool compete.
      grams: by path the mean of x x^T over the inputs of the kernel, (in, in) or (layers, in, in):
        `dsee_jax.prune.calibration.grams`.
      squares: by path the squared gradients at the outputs of the kernel, (out,) or (layers, out), all of the same losses and
        examples: `dsee_jax.prune.fisher.outputs`. None: every kernel is pruned alike.
      sparsity: the fraction of zeros, in [0, 1), where ``m`` is 0.
      n: entries kept of each group.
      m: consecutive inputs that make a group; divides the inputs of every kernel. 0: no groups.
      damping: added to the diagonal of H, relative to its mean; more than 0.

    Returns:
      Bool masks at the selected paths, nested dicts, True = kept; and params like ``params``.

    Raises:
      InputError: as `dsee_jax.prune.unstructured`; a kernel has no matrix of its inputs, or one that is not positive definite;
        or no squares of its outputs.
    """
    if not damping > 0:
        raise InputError(f"damping is {damping}; expected more than 0: few inputs leave H singular")
    chosen: dict[str, Chosen] = {}
    if squares is not None:
        pools: dict[int, list[Selected]] = {}
        for each in selected(params, adapter, rules, {"sparsity": sparsity, "n": n, "m": m}):
            if not each.options["m"]:
                pools.setdefault(each.pool, []).append(each)
        for pool in pools.values():
            kernels = {path: kernel for path, kernel, *_ in pool}
            means = {
                path: jnp.diagonal(_gram(path, kernel, grams), axis1=-2, axis2=-1) for path, kernel in kernels.items()
            }
            chosen |= choose(kernels, means, squares, sparsity=pool[0].options["sparsity"])
    return prune(params, adapter, rules, grams=grams, chosen=chosen, sparsity=sparsity, n=n, m=m, damping=damping)


class Chosen(NamedTuple):
    """What goes of a kernel whose entries compete with those of other kernels."""

    counts: np.ndarray  # (layers..., blocks): the entries that go of each block
    squares: Array  # (layers..., out)


def choose(
    kernels: Mapping[str, Kernel], means: Mapping[str, Array], squares: Mapping[str, Array], *, sparsity: float
) -> dict[str, Chosen]:
    """Return by path what goes of each kernel where all entries compete: `dsee_jax.prune.fisher.lowest`."""
    matrices = {path: orientation.matrix(kernel.w, kernel.orientation) for path, kernel in kernels.items()}
    squares = {path: multihost.to_host(square) for path, square in squares.items() if path in matrices}
    counts = fisher.lowest(matrices, means, squares, sparsity=sparsity, block=BLOCK)
    return {path: Chosen(count, squares[path]) for path, count in counts.items()}


def prune(
    params: Params,
    adapter: Adapter | None,
    rules: Rules | Sequence[str],
    *,
    grams: Mapping[str, Array],
    chosen: Mapping[str, Chosen],
    damping: float = DAMPING,
    **amounts: Any,
) -> tuple[dict[str, Any], Params]:
    """Return the result of `sparsegpt`, where ``chosen`` fixes what goes of its kernels; the others follow ``amounts``."""
    masks: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for path, kernel, options, _ in selected(params, adapter, rules, amounts):
        w: Any = orientation.matrix(multihost.to_host(kernel.w), kernel.orientation)
        gram: Any = multihost.to_host(_gram(path, kernel, grams))
        own: Any = chosen.get(path)
        try:
            parts = [
                reconstruct(
                    w[layer],
                    gram[layer],
                    **options,
                    damping=damping,
                    chosen=own and Chosen(own.counts[layer], own.squares[layer]),
                )
                for layer in np.ndindex(w.shape[:-2])
            ]
        except InputError as error:
            raise InputError(f"{path!r}: {error}") from None
        for tensors, part in zip((masks, new), zip(*parts, strict=True), strict=True):
            matrix: Any = np.stack(multihost.to_host(part)).reshape(w.shape)
            tensors[path] = _like(orientation.tensor(matrix, kernel.w, kernel.orientation), kernel.w)
    return tree.unflatten(masks), tree.replace(params, new)


def _gram(path: str, kernel: Kernel, grams: Mapping[str, Array]) -> Any:
    """Return the matrix of the inputs of a kernel."""
    *layers, inputs, _ = orientation.matrix_shape(kernel.w.shape, kernel.orientation)
    gram, shape = grams.get(path), (*layers, inputs, inputs)
    if gram is None or tuple(gram.shape) != shape:
        raise InputError(
            f"SPARSEGPT of {path!r} needs grams of the shape {shape}; found "
            f"{'nothing' if gram is None else gram.shape}: pass "
            "grams=dsee_jax.prune.calibration.grams(model, params, batches)"
        )
    return gram


def _like(values: Any, w: Array) -> Array:
    """Return a host array on the devices of ``w``; on the host where ``w`` is."""
    values = np.asarray(values)
    if not isinstance(w, jax.Array):
        return values
    return jax.make_array_from_callback(values.shape, w.sharding, lambda part: values[part])


def reconstruct(
    w: Array,
    gram: Array,
    *,
    sparsity: float = 0.5,
    n: int = 0,
    m: int = 0,
    block: int = BLOCK,
    damping: float = DAMPING,
    chosen: Chosen | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the mask of one matrix, True = kept, and its weights, both (in, out), the weights in the dtype of ``w``.

    Inputs are processed in their order. The entries of an input that are pruned change those of all later inputs by the exact
    least-squares solution, with the earlier inputs frozen. Inputs that are always 0 score 0; their kept weights stay. Entries
    that are 0 at first score lower still and stay 0, pruned or not.

    Args:
      w: (in, out).
      gram: H up to any factor, (in, in).
      sparsity: the fraction of zeros, where ``m`` is 0.
      n: entries kept of every ``m`` consecutive inputs.
      m: divides ``in``; 0: no groups.
      block: inputs whose entries compete at a time, rounded down to a multiple of ``m``. The number that goes of a block is
        that which makes the sparsity of all blocks up to it exact.
      damping: added to the diagonal, relative to its mean over inputs that are not always 0.
      chosen: the entries that go of each block, and the squared gradients (out,) of the outputs, which weigh the scores; in
        place of ``sparsity``. None: the outputs count alike.

    Raises:
      InputError: m does not divide the inputs, or the damped matrix is not positive definite in float32.
    """
    inputs, outputs = w.shape
    if m and (inputs % m or not 0 < n <= m):
        raise InputError(f"{n}:{m} needs groups of {m} inputs and 0 < n <= m; found {inputs} inputs")
    block = min(max(block // m * m, m) if m else block, inputs)
    factor = _factor(jnp.asarray(gram, jnp.float32), damping)
    if not bool(jnp.all(jnp.isfinite(factor))):
        raise InputError(
            f"the matrix x x^T of its inputs plus {damping:g} of its mean diagonal is not positive definite in float32: "
            "measure more examples, or in Python pass a larger damping"
        )
    if chosen is None:
        ends = np.minimum(np.arange(0, inputs + block, block), inputs)
        chosen = Chosen(np.diff([round(sparsity * int(end) * outputs) for end in ends]), jnp.ones(outputs))
    dead = jnp.diagonal(jnp.asarray(gram)) == 0
    counts, squares = jnp.asarray(chosen.counts, jnp.int32), jnp.asarray(chosen.squares, jnp.float32)
    mask, new = _prune(jnp.asarray(w, jnp.float32), factor, dead, counts, squares, n, m, block)
    return mask, new.astype(w.dtype)


@jax.jit
def _factor(gram: jax.Array, damping: float) -> jax.Array:
    """Return the upper triangular R with ``R^T R`` the inverse of the damped matrix; not finite if that is not positive."""
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1)
    mean = jnp.where(mean == 0, 1.0, mean)
    damped = gram + jnp.diag(jnp.where(dead, mean, 0.0) + damping * mean)
    # H = U U^T with U upper triangular is a Cholesky factor from the other corner, and R is the inverse of U.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(gram), dtype=gram.dtype), lower=False)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _prune(
    w: jax.Array,
    factor: jax.Array,
    dead: jax.Array,
    counts: jax.Array,
    squares: jax.Array,
    n: int,
    m: int,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    inputs = w.shape[0]
    pad = len(counts) * block - inputs
    w, factor = jnp.pad(w, ((0, pad), (0, 0))), jnp.pad(factor, ((0, pad), (0, pad)))
    places = jnp.arange(inputs + pad)
    real = places < inputs
    root = jnp.where(real, jnp.diagonal(factor), 1.0)
    alive = jnp.pad(~dead, (0, pad))
    empty = (w == 0) & real[:, None]

    def saliency(rows: jax.Array, start: Any) -> jax.Array:
        """Return roots of q w^2 / d^2 of rows from ``start`` on.

        They are 0 for inputs that are always 0, -1 for entries that are 0 at first, and infinite for the padding.
        """
        own = (jax.lax.dynamic_slice_in_dim(values, start, len(rows)) for values in (alive, root, real, empty))
        own_alive, own_root, own_real, own_empty = (each.reshape(len(rows), -1) for each in own)
        scores = jnp.where(own_alive, jnp.sqrt(squares)[None] * jnp.abs(rows / own_root), 0.0)
        return jnp.where(own_real, jnp.where(own_empty, -1.0, scores), jnp.inf)

    def with_group(rows: jax.Array, kept: jax.Array, i: Any, start: Any) -> jax.Array:
        """Return the mask of the rows of a block with the group that begins at row ``i`` drawn."""
        group = jax.lax.dynamic_slice_in_dim(rows, i, m)
        return jax.lax.dynamic_update_slice_in_dim(kept, n_m(saliency(group, start + i), n, m), i, 0)

    def of_block(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, mask = state
        start = number * block
        rows = jax.lax.dynamic_slice_in_dim(w, start, block)
        solver = jax.lax.dynamic_slice_in_dim(factor, start, block)
        square = jax.lax.dynamic_slice_in_dim(solver, start, block, axis=1)
        # Groups are drawn when their first input is reached.
        kept = jnp.ones(rows.shape, bool) if m else top_k(saliency(rows, start), rows.size - counts[number])

        def of_input(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            rows, kept, errors = state
            if m:
                kept = jax.lax.cond(i % m == 0, lambda: with_group(rows, kept, i, start), lambda: kept)
            stays = kept[i] & ~empty[start + i]
            error = jnp.where(stays, 0.0, rows[i]) / root[start + i]
            return rows - square[i][:, None] * error[None], kept, errors.at[i].set(error)

        rows, kept, errors = jax.lax.fori_loop(0, block, of_input, (rows, kept, jnp.zeros_like(rows)))
        later = jnp.where((places >= start + block)[None], solver, 0.0)
        w = jax.lax.dynamic_update_slice_in_dim(w, rows, start, 0)
        w = w - jnp.matmul(later.T, errors, precision="highest")
        return w, jax.lax.dynamic_update_slice_in_dim(mask, kept, start, 0)

    w, mask = jax.lax.fori_loop(0, len(counts), of_block, (w, jnp.ones(w.shape, bool)))
    return mask[:inputs], jnp.where(mask & ~empty, w, 0.0)[:inputs]
