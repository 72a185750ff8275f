"""The types of the trees of this library.

Four trees share one set of paths such as ``encoder/layer_0/attention/query/kernel``:

========  =============================================================  ==================================
tree      leaves                                                         who changes it
========  =============================================================  ==================================
params    the pretrained weights and the task head                       loader, pruning, merging; the head: the optimiser
deltas    at touched kernels a dict of ``a``, ``b`` and/or ``values``    the optimiser, and nothing else
supports  at the same kernels, int32 coordinates of ``values``           selectors, once
masks     at pruned kernels, bool, **True = kept**                       pruning
========  =============================================================  ==================================

A tree holds only the paths that it concerns, and never ``None`` (in JAX, ``None`` is an empty node and no leaf).
Kernels have shape ``(in, out)``, so ``y = x @ W``. ``sparsity`` is the fraction of zeros, in ``[0, 1)``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
"""An array of JAX or of NumPy."""
Key: TypeAlias = jax.Array
"""A PRNG key from ``jax.random.key``."""

Tree: TypeAlias = Mapping[str, Any]
"""Nested dicts of arrays."""

Params: TypeAlias = Mapping[str, Any]
"""Nested dicts; kernels ``(in, out)``, biases ``(out,)``, embeddings ``(rows, width)``."""

Delta: TypeAlias = Mapping[str, Array]
"""The update of one kernel: ``a`` (in, r) and ``b`` (r, out), and/or ``values`` (nnz,)."""

Deltas: TypeAlias = Mapping[str, Any]
"""Nested dicts ending in a `Delta` at each updated kernel."""

Supports: TypeAlias = Mapping[str, Any]
"""Nested dicts; at each kernel with ``values``, int32 (nnz, 2): row (input) and column (output), in row-major order."""

Masks: TypeAlias = Mapping[str, Any]
"""Nested dicts of bool arrays shaped like their kernel. True = kept."""

Rules: TypeAlias = Sequence[tuple[str, Any]]
"""Ordered ``(regex, value)``; a path has the value of the first regex that matches the complete path."""

Loss: TypeAlias = Callable[[Array, Mapping[str, Array]], jax.Array]
"""``(outputs of a model, batch) -> losses``, with the shape of ``batch["weights"]``."""


class Module(Protocol):
    """A Linen module, as far as the wings below the models use it."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        ...


class Units(NamedTuple):
    """The units of one kind in one layer."""

    axes: Mapping[str, tuple[int, int]]
    """Path of a param -> (axis, entries of a unit along that axis). All params hold the units in the same order."""
    scored: tuple[str, ...]
    """Kernels with units along an output axis; the weights of a unit, summed over all other axes, make its score."""


Cuts: TypeAlias = Mapping[str, Sequence[Units]]
"""The units of every layer in order, by kind (``heads``, ``neurons``)."""
