"""Multiply-adds per token and per example, counted from the trees.

A token is multiplied by every kernel outside the task head, and by the matrix that makes the logits of a language model,
whether that is a kernel of its own or tied to the table of words (`kernels`). A kernel (in, out) costs ``in * out``
multiply-adds per token when dense, and ``nnz(W)`` when pruned and run by code that skips zeros. An update that stays in
factors adds ``r * (in + out) + nnz(S)`` (methods of DSEE, section "cost at inference"). The cost of attention grows with the
length. Norms, biases, softmax and activations are left out: they are about one percent of the FLOPs that XLA counts for a
BERT of real width.
"""

from collections.abc import Container, Iterable, Sequence

import numpy as np

from dsee_jax import models, tree
from dsee_jax.deltas.adapter import count
from dsee_jax.models.architecture import Model
from dsee_jax.typing import Deltas, Params, Units

COUNTED = (
    "kernels of all layers and the output matrix of a language model (tied or not), zeros skipped in final, and the factors "
    "of updates; per token without, per example with the attention scores and weighted sums of values; without the task "
    "head, norms, biases, softmax and activations"
)
"""The operations that the figures of ``metrics.json`` count, for a person."""


def kernels(model: Model, params: Params, head: Container[str]) -> list[str]:
    """Return the paths of the matrices that multiply every token; ``head`` are the paths of the task head."""
    flat, tied = tree.flatten(params), models.find(model.config.model_type).tied
    paths = [path for path in flat if path.endswith("/kernel") and path not in head]
    if model.task == "causal-lm" and tied and tied[0] not in flat:
        paths.append(tied[1])
    return paths


def dense(params: Params, paths: Iterable[str]) -> int:
    """Return the multiply-adds per token of the matrices at ``paths``, (in, out) or (layers, in, out), as dense ones."""
    return sum(int(np.prod(tree.get(params, path).shape)) for path in paths)


def sparse(params: Params, paths: Iterable[str]) -> int:
    """Return the multiply-adds per token of the kernels at ``paths``, zeros skipped."""
    return sum(int(np.count_nonzero(tree.get(params, path))) for path in paths)


def factors(deltas: Deltas | None) -> int:
    """Return the multiply-adds per token of the updates as factors: one for every trained number."""
    return count(deltas)


def attention(params: Params, heads: Sequence[Units], length: int) -> int:
    """Return the multiply-adds per token, among ``length`` tokens, of the attention scores and of the weighted sums of values.

    ``heads`` are the units of kind heads of each layer. The rows of a head in the kernel of the attention output are the width
    of its values.
    """
    flat = tree.flatten(params)
    rows = (path for units in heads for path, (axis, _) in units.axes.items() if path.endswith("/kernel") and axis == 0)
    return sum(2 * length * flat[path].shape[0] for path in rows if path in flat)


def example(per_token: int, params: Params, heads: Sequence[Units], length: int) -> int:
    """Return the multiply-adds of one example of ``length`` tokens, with every position of every layer computed.

    ``per_token`` is the sum of `dense` or `sparse`, and `factors` for updates that stay in factors. A classifier whose last
    layer computes one position only does less.
    """
    return length * (per_token + attention(params, heads, length))
