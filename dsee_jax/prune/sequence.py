"""Pruning by the inputs of kernels, layer by layer: each layer is measured behind the layers that are pruned already.

The authors of WANDA and SparseGPT prune in this order. The kernels of one layer are measured together, before any of them is
pruned. A layer costs one pass over the examples. All passes run one compiled program.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dsee_jax import masks, stacks, tree
from dsee_jax.config import INPUT_SCORES, Scope, ScoreName
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.deltas.fold import materialize
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.models.architecture import Model, scans
from dsee_jax.prune import calibration, fisher, reconstruction, weights
from dsee_jax.prune.weights import selected
from dsee_jax.typing import Array, Loss, Masks, Params


def layerwise(
    model: Model,
    params: Params,
    adapter: Adapter | None,
    targets: Sequence[str],
    batches: Sequence[Mapping[str, Array]],
    *,
    score: ScoreName = "WANDA",
    sparsity: float = 0.5,
    scope: Scope = "tensor",
    n: int = 0,
    m: int = 0,
    keep: Masks | None = None,
    behind: bool = True,
    losses: Loss | None = None,
) -> tuple[dict[str, Any], Params]:
    """Return masks, and the params with the pruned weights at 0; with ``SPARSEGPT`` the weights that stay are changed too.

    Args:
      model: a model of this library, as from `dsee_jax.load_pretrained`.
      params: its params.
      adapter: updates beside them; the inputs are those of the model with its updates. None for none.
      targets: patterns of the kernels to prune, as in `DeltaConfig.targets`.
      batches: the calibration examples, read once per layer; each with ``weights`` (`dsee_jax.prune.calibration.gram`).
      score: one that reads inputs: ``WANDA``, ``RIA`` or ``SPARSEGPT``.
      sparsity: the fraction of zeros in each kernel, or in all together with ``global``, in [0, 1), where ``m`` is 0.
      scope: ``tensor`` or ``output``, as in `dsee_jax.prune.unstructured`; for ``SPARSEGPT`` ``tensor``, or ``global``: the
        entries of all kernels compete by the rise of the loss of the model before pruning (`dsee_jax.prune.fisher`), which
        costs one more pass and one of gradients.
      n: entries kept of every ``m`` consecutive inputs.
      m: the length of a group; 0: no groups.
      keep: earlier masks of the same kernels, which only shrink; not with ``SPARSEGPT`` and ``m``.
      behind: measure each layer behind the pruned ones. False: all on ``params`` as they are; the matrices of ``SPARSEGPT``
        are in memory for one layer at a time all the same.
      losses: for the scope ``global``, such as `dsee_jax.train.losses.cross_entropy`; the weights of the batch multiply them.

    Raises:
      InputError: another score or scope, no batches, a batch without ``weights``, a target that no linear module applies; or
        as `dsee_jax.prune.unstructured`.
    """
    if score not in INPUT_SCORES:
        raise InputError(f"score is {score!r}{did_you_mean(score, INPUT_SCORES)}: use one of {', '.join(INPUT_SCORES)}")
    solved = score == "SPARSEGPT"
    if solved and scope == "output":
        raise InputError("scope is 'output'; expected tensor or global: SPARSEGPT prunes blocks of inputs")
    if scope == "global" and (m or not solved):
        why = "groups of inputs do not compete" if m else "a layer is pruned before the later ones are measured"
        raise InputError(f"scope is 'global'; expected tensor{'' if m else ' or output'}: {why}")
    if scope == "global" and losses is None:
        raise InputError(
            "scope is 'global' and there are no losses, by which kernels are compared: pass losses=..., such as "
            "dsee_jax.train.losses.cross_entropy, or scope='tensor'"
        )
    if keep and (m or solved):
        raise InputError("keep is for sparsity, and not for SPARSEGPT: leave it out")
    if not batches:
        raise InputError("there are no batches to measure inputs on; expected one or more, with examples")
    for number, batch in enumerate(batches):
        if "weights" not in batch:
            raise InputError(
                f"batch {number} has {', '.join(sorted(batch))} and no 'weights': add it, 1 for each example that "
                "counts and 0 for a filler row"
            )
    paths, stacked = calibration.paths_apart(model, tree.select(targets, tree.flatten(params))), scans(model)
    if stacked:
        adapter, keep = _unstacked(adapter), stacks.unstack(keep or {})
    one_by_one: Any = model.clone(scan=False) if stacked else model
    model, current = calibration.apart(model, params)
    if keep:
        current = masks.apply(current, keep)
    order, earlier = calibration.groups(model, current, batches[0], paths), tree.flatten(keep or {})
    folded, drawn = materialize(current, adapter), {}
    chosen: dict[str, reconstruction.Chosen] = {}
    if losses is not None and scope == "global":
        kernels = {path: kernel for path, kernel, *_ in selected(current, adapter, list(map(re.escape, paths)), {})}
        means = {path: jnp.square(size) for path, size in calibration.sizes(model, folded, batches).items()}
        squares = fisher.outputs(calibration.losses(one_by_one, losses), folded, paths, batches)
        chosen = reconstruction.choose(kernels, means, squares, sparsity=sparsity)
    for number, group in enumerate(order):
        rules = [(re.escape(path), True) for path in group]
        if solved:
            grams = calibration.grams_of(model, folded, batches, order, number)
            options: Any = {"grams": grams, "chosen": chosen, "sparsity": sparsity, "n": n, "m": m}
            new, current = reconstruction.prune(current, adapter, rules, **options)
        else:
            inputs: Any = {"score": score, "inputs": calibration.sizes_of(model, folded, batches, order, number)}
            if m:
                new = weights.nm(current, adapter, rules, n=n, m=m, **inputs)
            else:
                own = tree.unflatten({path: earlier[path] for path in group if path in earlier})
                new = weights.unstructured(
                    current, adapter, rules, sparsity=sparsity, scope=scope, keep=own or None, **inputs
                )
            current = masks.apply(current, new)
        drawn |= tree.flatten(new)
        if behind:
            folded = materialize(current, adapter)
    kept = tree.unflatten({path: drawn[path] for path in paths})
    return (stacks.stack(kept), stacks.stack(current)) if stacked else (kept, current)


def _unstacked(adapter: Adapter | None) -> Adapter | None:
    if adapter is None:
        return None
    deltas, supports = stacks.unstack(adapter.deltas), stacks.unstack(adapter.supports)
    return adapter.replace(deltas=deltas, supports=supports)
