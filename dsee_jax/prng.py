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
        # jax_default_prng_impl decides the length of a raw key: threefry has 2 words, rbg 4.
        if key.shape in ([()] if typed else [(2,), (4,)]) and (typed or key.dtype == jnp.uint32):
            return
    raise InputError(f"key is {found}; expected one PRNG key: pass jax.random.key(0)")
