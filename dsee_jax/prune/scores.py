"""How much each weight of one kernel matters; pruning takes the lowest (DSEE, arXiv 2111.00160, section 3.3).

With the update ``D = scale * (A @ B + S)`` of a kernel ``W``:

======  ==========================
W       ``|W|``
WAB     ``|W + scale * A @ B|``
WABS    ``|W + D|``
AB      ``|scale * A @ B|``
ABS     ``|D|``
NAB     ``1 / |scale * A @ B|``
NABS    ``1 / |D|``
WANDA   ``|W|`` times the root mean square of the input that it multiplies
random  uniform in [0, 1)
======  ==========================

WANDA is of Sun et al. 2023 (arXiv 2306.11695, equation 1; there the norm of the input, which is the same up to the number of
tokens). The update is not in it: pruning takes W away and leaves D.
The authors' code scales S alone in ``WABS``, an operator precedence slip; here A @ B is scaled too.
A score that is not a number counts as the lowest there is (see `dsee_jax.deltas.supports.top_k`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError
from dsee_jax.typing import Array, Key


def _wide(*arrays: Array) -> jax.Array:
    """The magnitude of a sum, in float32."""
    return jnp.abs(sum(jnp.asarray(array, jnp.float32) for array in arrays))


def _random(
    w: Array, low_rank: Array, update: Array, *, key: Key | None = None, inputs: Array | None = None
) -> jax.Array:
    del low_rank, update, inputs
    if key is None:
        raise InputError("the score 'random' needs a key: pass key=jax.random.key(seed)")
    return jax.random.uniform(key, w.shape)


def _wanda(
    w: Array, low_rank: Array, update: Array, *, key: Key | None = None, inputs: Array | None = None
) -> jax.Array:
    del low_rank, update, key
    if inputs is None:
        raise InputError("the score 'WANDA' needs the sizes of the inputs: pass inputs=dsee_jax.activations.sizes(...)")
    return _wide(w) * inputs[..., None]


SCORES: dict[str, Callable[..., jax.Array]] = {
    "W": lambda w, low_rank, update, *, key=None, inputs=None: _wide(w),
    "WAB": lambda w, low_rank, update, *, key=None, inputs=None: _wide(w, low_rank),
    "WABS": lambda w, low_rank, update, *, key=None, inputs=None: _wide(w, update),
    "AB": lambda w, low_rank, update, *, key=None, inputs=None: _wide(low_rank),
    "ABS": lambda w, low_rank, update, *, key=None, inputs=None: _wide(update),
    "NAB": lambda w, low_rank, update, *, key=None, inputs=None: 1 / _wide(low_rank),
    "NABS": lambda w, low_rank, update, *, key=None, inputs=None: 1 / _wide(update),
    "WANDA": _wanda,
    "random": _random,
}
"""Every score by name: ``score(w, low_rank, update, *, key=None, inputs=None)``, arrays of one shape (in, out) or
(layers, in, out).

``low_rank`` is ``scale * A @ B`` and ``update`` is D, both dense. The result is float32, never negative; NAB and NABS of 0
are infinite. Only ``random`` reads the key, and only ``WANDA`` reads ``inputs`` (in,) or (layers, in).
"""

READS_UPDATE = frozenset({"WAB", "WABS", "AB", "ABS", "NAB", "NABS"})
"""Scores that become ``W`` for a kernel without an update."""
