"""The files beside the merged weights: configuration, tokenizer, model card and heat map."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
