"""Multiply-adds per token and per example, counted from the trees.

A kernel (in, out) costs ``in * out`` multiply-adds a token when dense and ``nnz(W)`` when pruned and run by a kernel that
skips zeros; its update, kept as factors, adds ``r * (in + out) + nnz(S)`` (methods of DSEE, section "cost at inference").
What attention adds grows with the length. Norms, biases, softmax and activations are left out: of what XLA counts for a BERT
of real width they are about one percent.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from dsee_jax import tree
from dsee_jax.deltas import fold
from dsee_jax.typing import Deltas, Params, Units


def dense(params: Params, paths: Iterable[str]) -> int:
    """Return the multiply-adds a token of the kernels at ``paths`` (in, out), or (layers, in, out), all entries counted."""
    return sum(int(np.prod(tree.get(params, path).shape)) for path in paths)


def sparse(params: Params, paths: Iterable[str]) -> int:
    """Return the same with only the nonzero entries counted."""
    return sum(int(np.count_nonzero(tree.get(params, path))) for path in paths)


def factors(deltas: Deltas | None) -> int:
    """Return the multiply-adds a token of the updates while they stay factors: every trained number is used once."""
    return fold.count(deltas)


def attention(params: Params, heads: Sequence[Units], length: int) -> int:
    """Return the multiply-adds a token, among ``length`` tokens, of attention scores and of mixing values by them.

    ``heads`` are the cuts of kind heads, a layer each: a head's rows of the attention output are what it mixes.
    """
    flat = tree.flatten(params)
    rows = (path for units in heads for path, (axis, _) in units.axes.items() if path.endswith("/kernel") and axis == 0)
    return sum(2 * length * flat[path].shape[0] for path in rows if path in flat)


def example(per_token: int, params: Params, heads: Sequence[Units], length: int) -> int:
    """Return the multiply-adds of one example of ``length`` tokens, every position of every layer computed.

    ``per_token`` is the sum of what applies of `dense` or `sparse`, and `factors`. A classifier that reads one position, of
    which the last layer computes no other, does less.
    """
    return length * (per_token + attention(params, heads, length))
