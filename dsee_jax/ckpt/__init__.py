"""Files: Hugging Face checkpoints, adapters, masks, and the checkpoints of a run."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
