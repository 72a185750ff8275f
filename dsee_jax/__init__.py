"""DSEE in JAX: tune pretrained transformers by low-rank + sparse updates, prune them, and keep them small.

model, params = dsee_jax.load_pretrained(path, num_labels=2)
deltas, supports = dsee_jax.deltas.init(params, dsee_jax.DeltaConfig(rank=16, nonzeros=64), key=jax.random.key(0))
logits = dsee_jax.apply(model, params, deltas, supports, batch)
masks = dsee_jax.prune.unstructured(params, deltas, supports, [("encoder/.*/kernel", True)], sparsity=0.5)
masks = dsee_jax.prune.structured(params, deltas, supports, dsee_jax.models.cuts(model), heads=0.25, neurons=0.4)
small_model, small_params = dsee_jax.compact(model, params, masks)

model, params = dsee_jax.load_pretrained(path, task="causal-lm")
tokens = dsee_jax.generate(model, params, input_ids, attention_mask, new_tokens=64)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsee_jax import decompose, deltas, generation, masks, models, prune, tree
    from dsee_jax.ckpt.hf import load_pretrained, save_pretrained
    from dsee_jax.compaction import compact
    from dsee_jax.config import Config, DeltaConfig
    from dsee_jax.deltas import apply, materialize
    from dsee_jax.errors import InputError
    from dsee_jax.generation import generate

__all__ = [
    "Config",
    "DeltaConfig",
    "InputError",
    "apply",
    "compact",
    "decompose",
    "deltas",
    "generate",
    "generation",
    "load_pretrained",
    "masks",
    "materialize",
    "models",
    "prune",
    "save_pretrained",
    "tree",
]

_FROM = {
    "load_pretrained": "ckpt.hf",
    "save_pretrained": "ckpt.hf",
    "compact": "compaction",
    "Config": "config",
    "DeltaConfig": "config",
    "apply": "deltas",
    "materialize": "deltas",
    "InputError": "errors",
    "generate": "generation",
}
"""Where each name of `__all__` stands that is no module itself."""


def __getattr__(name: str) -> Any:
    """Import what is asked for, and no more: a command that needs no model does not wait for Flax."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_FROM.get(name, name)}")
    found = globals()[name] = getattr(module, name) if name in _FROM else module
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
