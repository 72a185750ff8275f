"""Multiply-adds per token, counted from the trees.

A kernel (in, out) costs ``in * out`` multiply-adds a token when dense and ``nnz(W)`` when pruned and run by a kernel that
skips zeros; its update, kept as factors, adds ``r * (in + out) + nnz(S)`` (methods of DSEE, section "cost at inference").
Attention scores, norms and biases are left out: they are the same before and after unstructured pruning.
"""

from collections.abc import Iterable

import numpy as np

from dsee_jax import deltas as delta_trees
from dsee_jax import tree
from dsee_jax.aliases import Deltas, Params


def dense(params: Params, paths: Iterable[str]) -> int:
    """Return the multiply-adds a token of the kernels at ``paths`` (in, out), or (layers, in, out), all entries counted."""
    return sum(int(np.prod(tree.get(params, path).shape)) for path in paths)


def sparse(params: Params, paths: Iterable[str]) -> int:
    """Return the same with only the nonzero entries counted."""
    return sum(int(np.count_nonzero(tree.get(params, path))) for path in paths)


def factors(deltas: Deltas | None) -> int:
    """Return the multiply-adds a token of the updates while they stay factors: every trained number is used once."""
    return delta_trees.count(deltas)
