"""The verbs of ``python -m dsee_jax``, one per file: its flags beside the function that runs it."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
