"""Export of the model of a finished run to other formats."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
