"""Which weights go: unstructured and N:M masks of whole trees, and the gradual schedule.

Rules say what may go. Each is a regular expression over whole kernel paths, or ``(regex, value)``: ``True`` (prune it), ``False``
(leave it) or a mapping of options of its own. The first that matches a path counts; paths that none matches are left whole.

A trap in the definition: scores of unlike size do not mix. With ``score="ABS"`` an updated kernel is compared by its small
update ``|D|`` and a kernel without one by its much larger ``|W|``, so a global pool of both loses the updated ones first.
Give either a pool of its own, as the authors of DSEE do (arXiv 2111.00160, section 3.3)::

    [(".*/(query|value)/kernel", {"score": "ABS", "sparsity": 0.5}), ("encoder/.*/kernel", True)]
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax import deltas as delta_trees
from dsee_jax import tree
from dsee_jax.aliases import Array, Delta, Deltas, Key, Masks, Params, Rules, Supports
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.scores import READS_UPDATE, SCORES
from dsee_jax.supports import kth, n_m, ordered, top_k


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
    keep: Masks | None = None,
) -> dict[str, Any]:
    """Return masks without the lowest-scoring entries of the kernels that the rules select.

    Of a pool of N entries exactly ``round(sparsity * N)`` go; of equal scores the one at the lowest index is kept (kernels
    in the order of the tree, then row-major). A score that is not a number is the lowest.

    Args:
      params: the tree of weights; selected leaves are floating, (in, out) or (layers, in, out).
      deltas: updates at some of its paths, or None.
      supports: their coordinates, or None.
      rules: see above. All kernels whose rule says ``True`` share one pool; a rule with a mapping ``{"sparsity", "score"}``
        (either may be left out) makes a pool of its own.
      sparsity: the fraction of zeros in each pool, in [0, 1).
      score: a name in `SCORES`. Kernels without an update score ``W``, except under ``random``.
      scope: ``global`` compares over the whole pool, ``tensor`` prunes each kernel by itself.
      scale: alpha / rank of the updates.
      scale_sparse: whether S is scaled too.
      key: for ``random``; folded with the index of the kernel among those selected.
      keep: earlier masks at the same paths. What they prune goes first and stays pruned: masks only shrink.

    Returns:
      Bool masks at the selected paths. True = kept.

    Raises:
      InputError: a rule matches nothing or no kernel, or an argument is out of range; the message names it.
    """
    if scope not in ("global", "tensor"):
        raise InputError(f"scope is {scope!r}: use 'global' or 'tensor'")
    pools = _pools(params, rules, {"sparsity": sparsity, "score": score})
    kernels = _selected(params, pools)
    earlier = tree.flatten(keep) if keep else {}
    if keep and earlier.keys() != kernels.keys():
        path = min(earlier.keys() ^ kernels.keys())
        raise InputError(f"keep and the rules must cover the same kernels; only one of them has {path!r}")
    score_of = _scorer(deltas, supports, scale=scale, scale_sparse=scale_sparse, key=key)
    ranks: dict[str, jax.Array] = {}
    for number, (path, w) in enumerate(kernels.items()):
        ranks[path] = ordered(score_of(number, path, w, pools[path][1]["score"]))
    masks: dict[str, jax.Array] = {}
    for pool, options in {pool: options for pool, options in pools.values() if options}.items():
        ...
    return tree.unflatten(masks)
