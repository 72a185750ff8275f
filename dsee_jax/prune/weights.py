"""Which weights go: unstructured, N:M and structured masks of whole trees, and the gradual schedule.

Rules say what may go. Each is a regular expression over whole kernel paths, or ``(regex, value)``: ``True`` (prune it),
``False`` (leave it) or a mapping of options of its own. The first that matches a path counts; paths that none matches are
left whole.

A trap in the definition: scores of unlike size do not mix. With ``score="ABS"`` an updated kernel is compared by its small
update ``|D|`` and a kernel without one by its much larger ``|W|``, so a global pool of both loses the updated ones first.
Give either a pool of its own, as the authors of DSEE do (arXiv 2111.00160, section 3.3)::

    [(".*/(query|value)/kernel", {"score": "ABS", "sparsity": 0.5}), ("encoder/.*/kernel", True)]
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import tree
from dsee_jax.config import PruneConfig
from dsee_jax.deltas import fold
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.ops.topk import highest, n_m, ordered
from dsee_jax.prune.scores import READS_UPDATE, SCORES
from dsee_jax.typing import Array, Delta, Deltas, Key, Masks, Params, Rules, Supports


def unstructured(
    params: Params,
    deltas: Deltas | None,
    supports: Supports | None,
    rules: Rules | Sequence[str],
    *,
    sparsity: float = 0.5,
    score: str = "WABS",
    scope: str = "global",
    scale: float = 2.0,
    scale_sparse: bool = True,
    key: Key | None = None,
    inputs: Mapping[str, Array] | None = None,
    keep: Masks | None = None,
) -> dict[str, Any]:
    """Return masks without the lowest-scoring entries of the kernels that the rules select.

    Of a pool of N entries exactly ``round(sparsity * N)`` go; of equal scores the one at the lowest index is kept (paths
    sorted as JAX does, then row-major). A score that is not a number is the lowest.

    Args:
      params: the tree of weights; selected leaves are floating, (in, out) or (layers, in, out).
      deltas: updates at some of its paths, or None.
      supports: their coordinates, or None.
      rules: see above. All kernels whose rule says ``True`` share one pool; a rule with a mapping ``{"sparsity", "score"}``
        (either may be left out) makes a pool of its own.
      sparsity: the fraction of zeros in each pool, in [0, 1).
      score: a name in `SCORES`. Kernels without an update score ``W``, except under ``random``.
      scope: ``global`` compares over the whole pool, ``tensor`` prunes each kernel by itself, each layer of stacked ones too,
        ``output`` each output of a kernel (a column): of N weights into it ``round(sparsity * N)`` go.
      scale: alpha / rank of the updates.
      scale_sparse: whether S is scaled too.
      key: for ``random``; folded with the index of the kernel among those selected.
      inputs: for ``WANDA``: the sizes of each kernel's inputs by its path (`dsee_jax.prune.calibration.sizes`).
      keep: earlier masks at the same paths. What they prune goes first and stays pruned: masks only shrink.

    Returns:
      Bool masks at the selected paths. True = kept.

    Raises:
      InputError: a rule matches nothing or no kernel, or an argument is out of range; the message names it.
    """
    if scope not in ("global", "tensor", "output"):
        raise InputError(f"scope is {scope!r}: use 'global', 'tensor' or 'output'")
    kernels, pools = _pools(params, rules, {"sparsity": sparsity, "score": score})
    earlier = tree.flatten(keep) if keep else {}
    if keep and earlier.keys() != kernels.keys():
        path = min(earlier.keys() ^ kernels.keys())
        raise InputError(f"keep and the rules must cover the same kernels; only one of them has {path!r}")
    rank = _ranker(kernels, deltas, supports, scale=scale, scale_sparse=scale_sparse, key=key, inputs=inputs)
    masks: dict[str, jax.Array] = {}
    for options, paths in pools:
        for group in [paths] if scope == "global" else [[path] for path in paths]:
            ranks = {path: rank(path, options["score"]) for path in group}
            if keep:
                # Below every score, even below not-a-number (0), which moves up to leave room.
                ranks = {path: jnp.where(earlier[path], jnp.maximum(ranks[path], 1), 0) for path in group}
            if scope == "output":
                found = _each_output(ranks, options["sparsity"])
            else:
                by_itself = scope == "tensor" and kernels[group[0]].ndim == 3
                found = (_each_layer if by_itself else _keep_highest)(ranks, options["sparsity"])
            masks |= {path: mask & earlier[path] for path, mask in found.items()} if keep else found
    return tree.unflatten({path: masks[path] for path in kernels})


def nm(
    params: Params,
    deltas: Deltas | None,
    supports: Supports | None,
    rules: Rules | Sequence[str],
    *,
    n: int = 2,
    m: int = 4,
    score: str = "W",
    scale: float = 2.0,
    scale_sparse: bool = True,
    key: Key | None = None,
    inputs: Mapping[str, Array] | None = None,
) -> dict[str, Any]:
    """Return masks that keep the ``n`` highest scores of every ``m`` consecutive inputs, as sparse tensor cores want them.

    Arguments as of `unstructured`; a rule may carry ``{"n", "m", "score"}``. Ties keep the lower input.

    Raises:
      InputError: as `unstructured`; or m does not divide a kernel's inputs.
    """
    kernels, pools = _pools(params, rules, {"n": n, "m": m, "score": score})
    rank = _ranker(kernels, deltas, supports, scale=scale, scale_sparse=scale_sparse, key=key, inputs=inputs)
    masks: dict[str, jax.Array] = {}
    for options, paths in pools:
        for path in paths:
            try:
                masks[path] = n_m(rank(path, options["score"]), options["n"], options["m"])
            except InputError as error:
                raise InputError(f"{path!r}: {error}") from None
    return tree.unflatten({path: masks[path] for path in kernels})


def cubic(t: float, *, initial: float = 0.0, final: float) -> float:
    """Return the sparsity final + (initial - final) (1 - t)^3 of a gradual schedule (Zhu and Gupta 2017, equation 1).

    The time ``t`` goes from 0 (initial) to 1 (final) and is clipped to that. From step to step pass the earlier masks as
    ``keep``.
    """
    return final + (initial - final) * (1 - min(max(t, 0.0), 1.0)) ** 3


def _pools(
    params: Params, rules: Rules | Sequence[str], defaults: dict[str, Any]
) -> tuple[dict[str, Array], list[tuple[dict[str, Any], list[str]]]]:
    """Return the selected kernels by path, and ``(options, paths)`` of each pool, paths in the order of the tree."""
    flat = tree.flatten(params)
    pairs = [(rule, True) if isinstance(rule, str) else rule for rule in rules]
    taken = tree.assign([(pattern, number) for number, (pattern, _) in enumerate(pairs)], flat, default=-1)
    pools: dict[int, tuple[dict[str, Any], list[str]]] = {}
    for path, number in taken.items():
        pattern, value = pairs[number] if number >= 0 else ("", False)
        if value is False:
            continue
        if value is not True and not isinstance(value, Mapping):
            raise InputError(f"rule {pattern!r} has the value {value!r}: use True, False or a mapping")
        own = {} if value is True else dict(value)
        for name in own.keys() - defaults.keys():
            raise InputError(
                f"rule {pattern!r} has the option {name!r}{did_you_mean(name, defaults)}: use {', '.join(defaults)}"
            )
        # All rules that say True share the pool -1.
        pools.setdefault(-1 if value is True else number, (defaults | own, []))[1].append(path)
    chosen = {path for _, paths in pools.values() for path in paths}
    kernels = {path: w for path, w in flat.items() if path in chosen}
    for path, w in kernels.items():
        if w.ndim not in (2, 3) or not jnp.issubdtype(w.dtype, jnp.floating):
            raise InputError(
                f"the rules select {path!r}, which is {w.dtype}{w.shape}: expected a floating kernel (in, out)"
            )
    for options, _ in pools.values():
        _check(options)
    return kernels, list(pools.values())


def _check(options: Mapping[str, Any]) -> None:
    if options["score"] not in SCORES:
        hint = did_you_mean(str(options["score"]), SCORES)
        raise InputError(f"score is {options['score']!r}{hint}: use one of {', '.join(SCORES)}")
    if not 0 <= options.get("sparsity", 0) < 1:
        raise InputError(
            f"sparsity is {options['sparsity']}, expected a fraction of zeros in [0, 1): 1.0 leaves no weight"
        )


def _ranker(
    kernels: Mapping[str, Array],
    deltas: Deltas | None,
    supports: Supports | None,
    *,
    scale: float,
    scale_sparse: bool,
    key: Key | None,
    inputs: Mapping[str, Array] | None,
) -> Callable[[str, str], jax.Array]:
    """Return ``rank(path, score)``: the `ordered` scores of one kernel, so that never more than a pool is in memory."""
    updates, coordinates = fold.kernels(deltas), tree.flatten(supports or {})
    numbers = {path: number for number, path in enumerate(kernels)}

    def rank(path: str, score: str) -> jax.Array:
        delta, folded = updates.get(path), None if key is None else jax.random.fold_in(key, numbers[path])
        if score in ("AB", "NAB") and delta is not None and "a" not in delta:
            raise InputError(
                f"the score {score!r} of {path!r} needs a low-rank update and it has none: use ABS or NABS"
            )
        if score in READS_UPDATE and delta is None:
            score = "W"
        sizes = None if inputs is None or score != "WANDA" else _sizes(path, kernels[path], inputs)
        return _rank(kernels[path], delta, coordinates.get(path), folded, sizes, score, scale, scale_sparse)

    return rank


def _sizes(path: str, w: Array, inputs: Mapping[str, Array]) -> Array:
    if path not in inputs or inputs[path].shape != w.shape[:-1]:
        found = inputs[path].shape if path in inputs else "nothing"
        raise InputError(f"the score 'WANDA' of {path!r} needs inputs of the shape {w.shape[:-1]}; found {found}")
    return inputs[path]


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _rank(
    w: Array,
    delta: Delta | None,
    support: Array | None,
    key: Key | None,
    inputs: Array | None,
    score: str,
    scale: float,
    scale_sparse: bool,
) -> jax.Array:
    low_rank, update = fold.updates(w, delta, support, scale=scale, scale_sparse=scale_sparse)
    return ordered(SCORES[score](w, low_rank, update, key=key, inputs=inputs))


def _keep_highest(ranks: Mapping[str, jax.Array], sparsity: float) -> dict[str, jax.Array]:
    """Masks of the highest of one pool; the counts are Python's, so that a pool may hold more than 2^31 entries."""
    total = sum(rank.size for rank in ranks.values())
    left = total - round(sparsity * total)
    arrays = list(ranks.values())
    bound = 0
    for bit in reversed(range(32)):
        higher = bound | 1 << bit
        if sum(_reaching(arrays, higher)) >= left:
            bound = higher
    # No rank is the highest uint32, so it stands for all above where nothing is kept.
    reached, above = _reaching(arrays, bound), _reaching(arrays, min(bound + 1, 2**32 - 1))
    left -= sum(above)
    masks: dict[str, jax.Array] = {}
    for (path, rank), at_least, more in zip(ranks.items(), reached, above, strict=True):
        take = min(left, at_least - more)
        left -= take
        masks[path] = rank >= np.uint32(bound) if more + take == at_least else highest(rank, more + take)
    return masks


def _each_layer(ranks: Mapping[str, jax.Array], sparsity: float) -> dict[str, jax.Array]:
    """Masks of the highest of every layer of stacked kernels."""
    sizes = {path: rank[0].size for path, rank in ranks.items()}
    return {path: _highest_each(rank, sizes[path] - round(sparsity * sizes[path])) for path, rank in ranks.items()}


def _each_output(ranks: Mapping[str, jax.Array], sparsity: float) -> dict[str, jax.Array]:
    """Masks of the highest of every column."""
    lengths = {path: rank.shape[-2] for path, rank in ranks.items()}
    return {
        path: _highest_columns(rank, lengths[path] - round(sparsity * lengths[path])) for path, rank in ranks.items()
    }


@jax.jit
def _highest_columns(rank: jax.Array, count: Array) -> jax.Array:
    columns = jnp.swapaxes(rank, -1, -2)
    kept = jax.vmap(highest, in_axes=(0, None))(columns.reshape(-1, columns.shape[-1]), count)
    return jnp.swapaxes(kept.reshape(columns.shape), -1, -2)


_highest_each = jax.jit(jax.vmap(highest, in_axes=(0, None)))


def _reaching(ranks: list[jax.Array], bound: int) -> list[int]:
    return [int(count) for count in jax.device_get(_count(ranks, np.uint32(bound)))]


@jax.jit
def _count(ranks: list[jax.Array], bound: Array) -> list[jax.Array]:
    return [jnp.sum(rank >= bound, dtype=jnp.int32) for rank in ranks]


def check_prunable(path: str, shape: tuple[int, ...], prune: PruneConfig) -> None:
    """Refuse now what pruning would refuse after the stage tune."""
    if len(shape) not in (2, 3):
        raise InputError(f"prune.targets takes {path!r}, which has the shape {shape}; expected a kernel (in, out)")
    if prune.kind == "nm" and shape[-2] % prune.m:
        raise InputError(f"prune.m is {prune.m}; {path!r} has {shape[-2]} inputs: use a number that divides them")
