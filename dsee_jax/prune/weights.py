"""Pruning of single weights: unstructured and N:M masks of trees, and the gradual schedule.

Rules select the kernels. A rule is a regular expression over full kernel paths, or ``(regex, value)`` with the value ``True``
(prune the kernel), ``False`` (do not prune it) or a mapping of its own options. The first rule that matches a path decides. A
path that no rule matches is not pruned.

Scores of different things do not compete. A score of the update alone, such as ``ABS``, gives an updated kernel the small
scores ``|D|``, and a kernel without an update the much larger scores ``|W|``. A pool of both is divided into two, each with
the sparsity of the pool, as the authors of DSEE do (arXiv 2111.00160, section 3.3). A rule gives a pool its own sparsity::

    [(".*/(query|value)/kernel", {"score": "ABS", "sparsity": 0.5}), ("encoder/.*/kernel", True)]

The inputs and outputs of a kernel are those of its matrix (`dsee_jax.orientation`). A rule states the orientation of kernels
that are neither (in, out) nor updated nor below ``layers``, and such a rule alone makes no pool::

    [("layers/./weight", {"orientation": "out_in"}), (".*/query/kernel", {"orientation": "in_out_out", "sparsity": 0.5})]
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsee_jax import counts, orientation, tree
from dsee_jax.auto_axes import auto_sharded, spec
from dsee_jax.config import UPDATE_SCORES, PruneConfig, Scope, ScoreName
from dsee_jax.counts import Count
from dsee_jax.deltas import fold
from dsee_jax.deltas.adapter import Adapter, Update, updates_of
from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.ops.topk import highest, n_m, ordered
from dsee_jax.prune.scores import SCORES, Evidence, check_low_rank, complete, divided, of_kernel
from dsee_jax.typing import Array, Delta, Key, Masks, Rules


def unstructured(
    params: object,
    adapter: Adapter | None,
    rules: Rules | Sequence[str],
    *,
    sparsity: float | Array = 0.5,
    score: ScoreName = "WABS",
    scope: Scope = "global",
    keep: Masks | None = None,
    **evidence: Unpack[Evidence],
) -> dict[str, Any]:
    """Return masks without the lowest-scoring entries of the kernels that the rules select.

    Exactly ``round(sparsity * N)`` of N competing entries go. Of equal scores the one at the lowest index is kept: paths in
    JAX's order, then row-major in the matrix of a kernel. A score that is not a number is the lowest.

    The function works under ``jax.jit`` and on sharded arrays, also those that span processes, and returns the same masks
    there. A pool has up to 2^40 entries.

    Args:
      params: any pytree of weights; selected leaves are floating, of any orientation.
      adapter: updates at some paths of ``params``; None for none, which is plain pruning of the weights.
      rules: see above. All kernels with the value ``True`` share one pool. A rule with a mapping makes a pool of its own; the
        mapping may hold ``sparsity`` and ``score``. It may also hold ``orientation``; with this alone, the kernels stay in the
        common pool.
      sparsity: the fraction of zeros in each pool, in [0, 1). It may be a JAX array of shape (), such as the result of a
        schedule of a traced step: then the number of zeros is that of its float32, and a traced fraction is clipped to [0, 1).
      score: a name in `dsee_jax.prune.scores.SCORES`. For a kernel without an update, scores that read updates become ``W``.
      scope: the entries that compete, N at a time. ``global``: all entries of a pool; for a score of the update alone, those
        with an update and those without are two pools. ``tensor``: those of each kernel, or of
        each layer of a stacked kernel. ``output``: those of each output of a kernel (a column of its matrix).
      keep: earlier masks at the same paths. Entries that they prune go first and stay pruned: masks only shrink.
      **evidence: ``key`` for ``random``, ``inputs`` for ``WANDA`` and ``RIA``, ``gradients`` for ``MOVEMENT``, ``TAYLOR`` and
        ``PLATON``; see `dsee_jax.prune.scores.Evidence`.

    Returns:
      Bool masks at the selected paths, nested dicts, each of the shape of its kernel. True = kept.

    Raises:
      InputError: a rule matches nothing or no kernel, an orientation fits neither its kernel nor the update, or an argument is
        out of range; the message names the rule, path or argument.
    """
    if scope not in ("global", "tensor", "output"):
        raise InputError(f"scope is {scope!r}: use 'global', 'tensor' or 'output'")
    kernels, pools = _pools(params, adapter, rules, {"sparsity": sparsity, "score": score})
    earlier = tree.flatten(keep) if keep else {}
    if keep and earlier.keys() != kernels.keys():
        path = min(earlier.keys() ^ kernels.keys())
        raise InputError(f"keep and the rules must select the same kernels; only one of the two has {path!r}")
    for path, mask in earlier.items():
        if mask.dtype != bool:
            raise InputError(f"the mask of {path!r} in keep is {mask.dtype}; expected bool, as masks are drawn")
        if mask.shape != kernels[path].w.shape:
            raise InputError(
                f"the mask of {path!r} in keep is {mask.shape}; expected {kernels[path].w.shape} of its kernel"
            )
    rank = _ranker(kernels, complete("unstructured", evidence), adapter, earlier)
    masks: dict[str, jax.Array] = {}
    for options, paths in pools:
        comparable = divided(paths, lambda path: kernels[path].update is not None, options["score"])
        for group in comparable if scope == "global" else [[path] for path in paths]:
            ranks = [rank(path, options["score"]) for path in group]
            if scope == "global":
                drawn = highest(ranks, _kept(options["sparsity"], sum(rank.size for rank in ranks)))
            else:
                competing = ranks[0].shape[-2:] if scope == "tensor" else ranks[0].shape[-2:-1]
                drawn = [_highest_apart(ranks[0], _kept(options["sparsity"], math.prod(competing)), scope)]
            masks |= {path: kernels[path].tensor(mask) for path, mask in zip(group, drawn, strict=True)}
    return tree.unflatten({path: masks[path] & earlier[path] if keep else masks[path] for path in kernels})


def nm(
    params: object,
    adapter: Adapter | None,
    rules: Rules | Sequence[str],
    *,
    n: int = 2,
    m: int = 4,
    score: ScoreName = "WABS",
    **evidence: Unpack[Evidence],
) -> dict[str, Any]:
    """Return masks that keep the ``n`` highest scores of every ``m`` consecutive inputs, the pattern of sparse tensor cores.

    ``params``, ``adapter``, ``rules``, ``score`` and ``evidence`` are those of `unstructured`. The mapping of a rule may hold
    ``n``, ``m``, ``score`` and ``orientation``. Of equal scores the one of the lowest input is kept. The function works under
    ``jax.jit`` and on sharded arrays.

    Args:
      n: entries kept of each group, 0 to m; the others of the group are pruned.
      m: consecutive inputs of one output that make a group; divides the inputs of every kernel.

    Returns:
      Bool masks at the selected paths, as `unstructured`.

    Raises:
      InputError: as `unstructured`; n or m is no whole number or is traced; or m does not divide the inputs of a kernel.
    """
    kernels, pools = _pools(params, adapter, rules, {"n": n, "m": m, "score": score})
    rank = _ranker(kernels, complete("nm", evidence), adapter)
    masks: dict[str, jax.Array] = {}
    for options, paths in pools:
        for path in paths:
            try:
                masks[path] = kernels[path].tensor(n_m(rank(path, options["score"]), options["n"], options["m"]))
            except InputError as error:
                raise InputError(f"{path!r}: {error}") from None
    return tree.unflatten({path: masks[path] for path in kernels})


class Selected(NamedTuple):
    """A kernel that the rules select."""

    path: str
    kernel: "Kernel"
    options: dict[str, Any]
    pool: int  # the number of its pool: kernels of one rule, or of all rules with the value True


def selected(
    params: object, adapter: Adapter | None, rules: Rules | Sequence[str], defaults: dict[str, Any]
) -> list[Selected]:
    """Return every kernel that the rules select, in the order of the tree.

    The options are ``defaults`` with those of the rule; raises `InputError` as `unstructured` does.
    """
    kernels, pools = _pools(params, adapter, rules, defaults)
    found = {
        path: Selected(path, kernels[path], {name: own[name] for name in defaults}, number)
        for number, (own, paths) in enumerate(pools)
        for path in paths
    }
    return [found[path] for path in kernels]


def cubic(
    final: float, *, steps: int, begin: int = 0, initial: float = 0.0
) -> Callable[[float | Array], float | Array]:
    """Return the gradual schedule of Zhu and Gupta (arXiv 1710.01878, equation 1): the sparsity as a function of the step.

    The sparsity is ``initial`` until the step ``begin``, grows as ``final + (initial - final) (1 - t)^3`` over the next
    ``steps`` steps, and is ``final`` from then on. The schedules of optax have the same form and serve as well. Draw with the
    earlier masks, so that masks only shrink::

        masks = unstructured(params, ..., sparsity=schedule(step), keep=masks)

    Args:
      final: the last sparsity, in [0, 1).
      steps: the number of steps from ``initial`` to ``final``, at least 1.
      begin: the step of the first growth.
      initial: the first sparsity, in [0, 1).

    Returns:
      A function of the step. For a Python number its result is a Python number, and for a JAX array, also a traced one, a
      float32.

    Raises:
      InputError: ``steps`` is below 1, or a sparsity is out of range.
    """
    if steps < 1:
        raise InputError(
            f"steps is {steps}; expected the number of steps from the first sparsity to the last, at least 1"
        )
    for name, sparsity in (("initial", initial), ("final", final)):
        _check_sparsity(name, sparsity)

    def schedule(step: float | Array) -> float | Array:
        time = (step - begin) / steps
        time = jnp.clip(time, 0, 1) if isinstance(time, jax.Array) else min(max(time, 0.0), 1.0)
        return final + (initial - final) * (1 - time) ** 3

    return schedule


class Kernel(NamedTuple):
    """A selected kernel."""

    w: Array
    orientation: str
    update: Update | None

    def tensor(self, matrix: jax.Array) -> jax.Array:
        """Return an array of the kernel's shape with this matrix."""
        return orientation.tensor(matrix, self.w, self.orientation)


def _pools(
    params: Any, adapter: Adapter | None, rules: Rules | Sequence[str], defaults: dict[str, Any]
) -> tuple[dict[str, Kernel], list[tuple[dict[str, Any], list[str]]]]:
    """Return the selected kernels by path, and ``(options, paths)`` of each pool; paths are in the order of the tree."""
    flat, updates = tree.arrays(params), updates_of(adapter)
    for path in updates:
        tree.lookup(flat, path)
    pairs = _pairs(rules)
    assigned = tree.assign([(pattern, number) for number, (pattern, _) in enumerate(pairs)], flat, default=-1)
    pools: dict[int, tuple[dict[str, Any], list[str]]] = {}
    kernels: dict[str, Kernel] = {}
    for path, number in assigned.items():
        pattern, value = pairs[number] if number >= 0 else ("", False)
        if value is False:
            continue
        if value is not True and not isinstance(value, Mapping):
            raise InputError(f"rule {pattern!r} has the value {value!r}: use True, False or a mapping")
        own = {} if value is True else dict(value)
        names = [*defaults, "orientation"]
        for name in own.keys() - set(names):
            raise InputError(
                f"rule {pattern!r} has the option {name!r}{did_you_mean(name, names)}: use {', '.join(names)}"
            )
        # All rules with the value True, or with an orientation alone, share the pool -1.
        common = value is True or own.keys() == {"orientation"}
        kernels[path] = _kernel(path, flat[path], own.pop("orientation", None), updates.get(path))
        pools.setdefault(-1 if common else number, (defaults | own, []))[1].append(path)
    for options, _ in pools.values():
        _check(options)
    return kernels, list(pools.values())


def _pairs(rules: Rules | Sequence[str]) -> Rules:
    """Return rules as pairs; raises `InputError` for rules and for the sequence of another form."""
    expected = "expected a sequence of regular expressions and of pairs (regular expression, True, False or a mapping)"
    if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
        raise InputError(f"the rules are {rules!r}; {expected}")
    pairs: list[tuple[str, Any]] = []
    for rule in rules:
        pair = (rule, True) if isinstance(rule, str) else rule
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise InputError(f"a rule is {rule!r}; {expected}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _kernel(path: str, w: Array, stated: str | None, update: Update | None) -> Kernel:
    """Return a kernel with the orientation that its rule states, that of its update, or the usual one."""
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise InputError(
            f"the rules select {path!r}, which is {w.dtype}{w.shape}; expected a floating kernel (in, out)"
        )
    if update is not None:
        fold.check(path, w.shape, update)
        if stated not in (None, update.orientation):
            raise InputError(
                f"the rule of {path!r} has the orientation {stated!r} and the adapter {update.orientation!r}: state the "
                "orientation of the adapter, or none"
            )
    return Kernel(w, orientation.find(path, w.shape, stated if update is None else update.orientation), update)


def _check(options: Mapping[str, Any]) -> None:
    score = options.get("score", "W")
    if score == "SPARSEGPT":
        raise InputError(
            "the score 'SPARSEGPT' changes the weights that stay: call dsee_jax.prune.sparsegpt, which returns them too"
        )
    if score not in SCORES:
        raise InputError(f"score is {score!r}{did_you_mean(str(score), SCORES)}: use one of {', '.join(SCORES)}")
    _check_sparsity("sparsity", options.get("sparsity", 0))
    for name in ("n", "m"):
        if not isinstance(options.get(name, 0), int | np.integer):
            raise InputError(
                f"{name} is {shorten(repr(options[name]))}; expected a whole number that is not traced, such as n=2, m=4: it "
                "decides the shape of the groups"
            )


def _check_sparsity(name: str, sparsity: float | Array) -> None:
    if isinstance(sparsity, str) or np.ndim(sparsity) or not hasattr(sparsity, "__float__"):
        raise InputError(
            f"{name} is {shorten(repr(sparsity))}; expected one number in [0, 1): of a schedule, its value at a step"
        )
    # A traced number is not known here, and is clipped.
    if not isinstance(sparsity, Tracer) and not 0 <= sparsity < 1:
        raise InputError(f"{name} is {sparsity}; expected a fraction of zeros in [0, 1): 1.0 leaves no weight")


def _ranker(
    kernels: Mapping[str, Kernel],
    evidence: Mapping[str, Any],
    adapter: Adapter | None,
    earlier: Mapping[str, Array] | None = None,
) -> Callable[[str, str], jax.Array]:
    """Return ``rank(path, score)``, the `ordered` scores of the matrix of one kernel.

    Memory then holds the scores of one pool at most. Entries that an earlier mask prunes have the lowest rank, 0.
    """
    scale, scale_sparse = (1.0, True) if adapter is None else (adapter.scale, adapter.scale_sparse)
    numbers = {path: number for number, path in enumerate(kernels)}
    key: Key | None = evidence["key"]

    def rank(path: str, score: str) -> jax.Array:
        w, axes, update = kernels[path]
        delta, support, _ = update or (None, None, None)
        folded = None if key is None else jax.random.fold_in(key, numbers[path])
        if delta is not None:
            check_low_rank(path, score, delta)
        if SCORES[score].reads_update and delta is None:
            score = "W"
        shapes = {"inputs": orientation.matrix_shape(w.shape, axes)[:-1], "gradients": tuple(w.shape)}
        arrays = of_kernel(path, shapes, score, evidence)
        mask = (earlier or {}).get(path)
        return _rank(w, delta, support, folded, arrays, mask, scale, score, scale_sparse, axes)

    return rank


@functools.partial(jax.jit, static_argnums=(7, 8, 9))
def _rank(
    w: Array,
    delta: Delta | None,
    support: Array | None,
    key: Key | None,
    evidence: dict[str, Array],
    earlier: Array | None,
    scale: float | Array,
    score: str,
    scale_sparse: bool,
    axes: str,
) -> jax.Array:
    matrix = orientation.matrix(w, axes)
    low_rank, update = fold.updates(matrix, delta, support, scale=scale, scale_sparse=scale_sparse)
    if "gradients" in evidence:
        evidence = evidence | {"gradients": orientation.matrix(evidence["gradients"], axes)}
    ranks = ordered(SCORES[score](matrix, low_rank, update, key=key, **evidence))
    if earlier is None:
        return ranks
    # 0 ranks below every score: not-a-number, which has rank 0, moves up to 1.
    return jnp.where(orientation.matrix(earlier, axes), jnp.maximum(ranks, 1), 0)


def _kept(sparsity: float | Array, entries: int) -> Count:
    """Return the number of entries to keep: exact for a Python number, and for a JAX array that of its float32."""
    if isinstance(sparsity, jax.Array):
        fraction = jnp.clip(sparsity.astype(jnp.float32), 0, np.nextafter(np.float32(1), np.float32(0)))
        return counts.subtract(counts.of(entries), counts.share(fraction, entries))
    return counts.of(entries - round(float(sparsity) * entries))


@functools.partial(jax.jit, static_argnums=2)
def _highest_apart(rank: jax.Array, k: Count, scope: str) -> jax.Array:
    """Return the masks of the ``k`` highest ranks of every layer, or of every output."""

    def select(rank: jax.Array) -> jax.Array:
        return highest([rank], k)[0]

    if scope == "output":
        select = jax.vmap(select, in_axes=-1, out_axes=-1)
    for _ in range(rank.ndim - 2):
        select = jax.vmap(select)
    return auto_sharded(select, rank, out=spec(rank))


def check_prunable(path: str, shape: tuple[int, ...], prune: PruneConfig) -> None:
    """Raise `InputError` if pruning would refuse the kernel at ``path`` after the stage tune."""
    if len(shape) not in (2, 3):
        raise InputError(f"prune.targets matches {path!r}, which has the shape {shape}; expected a kernel (in, out)")
    if prune.kind == "nm" and shape[-2] % prune.m:
        raise InputError(f"prune.m is {prune.m}; {path!r} has {shape[-2]} inputs: use a number that divides them")


def check_update(path: str, delta: Delta, prune: PruneConfig) -> None:
    """Raise `InputError` if pruning would refuse the update of the kernel at ``path`` after the stage tune."""
    if prune.kind != "earlybert" and prune.score in UPDATE_SCORES and "a" not in delta:
        others = "" if prune.kind == "structured" else ", or leave the kernel out of prune.targets"
        raise InputError(
            f"prune.score is {prune.score!r}; the update of {path!r} has values and no low-rank part: use W or WABS{others}"
        )
