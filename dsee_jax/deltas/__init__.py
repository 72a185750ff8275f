"""Low-rank + sparse updates of pretrained kernels: created, attached to a running model, or folded into the weights."""

from typing import TYPE_CHECKING

from dsee_jax.lazy import package

if TYPE_CHECKING:
    from dsee_jax.deltas.attach import apply, interceptor
    from dsee_jax.deltas.create import init
    from dsee_jax.deltas.fold import kernels, materialize

__all__ = ["apply", "init", "interceptor", "kernels", "materialize"]

_PUBLIC = {
    "apply": "attach",
    "interceptor": "attach",
    "init": "create",
    "kernels": "fold",
    "materialize": "fold",
}

__getattr__, __dir__ = package(__name__, _PUBLIC)
