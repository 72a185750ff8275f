"""The PRNG keys of callers."""

import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError, shorten


def check(key: object) -> None:
    """Raise `InputError` unless ``key`` is one key from ``jax.random.key`` or ``jax.random.PRNGKey``."""
    found = shorten(repr(key))
    if isinstance(key, jax.Array):
        found = f"an array of {key.dtype}{key.shape}"
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.shape == (() if typed else (2,)) and (typed or key.dtype == jnp.uint32):
            return
    raise InputError(f"key is {found}; expected one PRNG key: pass jax.random.key(0)")
