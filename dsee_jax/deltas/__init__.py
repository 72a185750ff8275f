"""Low-rank + sparse updates of pretrained kernels: created, attached to a running model, or folded into the weights."""

from typing import TYPE_CHECKING

from dsee_jax.lazy import package

if TYPE_CHECKING:
    from dsee_jax.deltas.adapter import Adapter, kernels
    from dsee_jax.deltas.attach import apply, attached
    from dsee_jax.deltas.create import init
    from dsee_jax.deltas.fold import materialize

__all__ = ["Adapter", "apply", "attached", "init", "kernels", "materialize"]

_PUBLIC = {
    "Adapter": "adapter",
    "apply": "attach",
    "attached": "attach",
    "init": "create",
    "kernels": "adapter",
    "materialize": "fold",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and reports other names
    __getattr__, __dir__ = package(__name__, _PUBLIC)
