"""A run: its config file, inputs and folder, the step, the stages, evaluation and results."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
