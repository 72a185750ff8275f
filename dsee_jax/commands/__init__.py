"""The verbs of ``python -m dsee_jax``, one per file: the description, an example, the flags and the function of each verb."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
