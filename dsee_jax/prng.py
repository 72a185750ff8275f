"""The PRNG keys of callers."""

import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError, shorten


def check(key: object) -> None:
    """Raise `InputError` unless ``key`` is one key from ``jax.random.key`` or ``jax.random.PRNGKey``."""
    if isinstance(key, jax.Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.shape == (() if typed else (2,)) and (typed or key.dtype == jnp.uint32):
            return
    raise InputError(f"key is {shorten(repr(key))}; expected one PRNG key: pass jax.random.key(0)")
