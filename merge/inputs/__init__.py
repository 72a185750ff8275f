"""The inputs of a merge: tensors read in chunks, with adapters folded in and vocabularies aligned."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
