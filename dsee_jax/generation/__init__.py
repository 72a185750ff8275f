"""Text generation with decoders: token ids from token ids, and texts from texts."""

from typing import TYPE_CHECKING

from dsee_jax.lazy import package

if TYPE_CHECKING:
    from dsee_jax.generation.decoding import generate, pad_left
    from dsee_jax.generation.pipeline import complete, load

__all__ = ["complete", "generate", "load", "pad_left"]

_PUBLIC = {
    "complete": "pipeline",
    "generate": "decoding",
    "load": "pipeline",
    "pad_left": "decoding",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and reports other names
    __getattr__, __dir__ = package(__name__, _PUBLIC)
