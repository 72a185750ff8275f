"""The masked model: a Linen model of full shape that computes as if its pruned units were gone.

`dsee_jax.compact` makes the smaller model with the same outputs; here a user may evaluate units before they are cut.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import models
from dsee_jax.deltas.attach import intercepted
from dsee_jax.errors import InputError, shorten
from dsee_jax.models.architecture import Model
from dsee_jax.models.layers import LayerNorm, RmsNorm
from dsee_jax.ops.nn import layer_norm, rms_norm
from dsee_jax.prune import compaction, earlybert, layers
from dsee_jax.prune.layers import layer
from dsee_jax.typing import Masks


@contextlib.contextmanager
def masked(model: Model, kept: Masks) -> Iterator[None]:
    """Run ``model`` without its pruned units in the block, by interceptors: its params, shapes and updates stay as they are.

    ::

        with dsee_jax.prune.masked(model, kept), dsee_jax.attached(adapter):
            logits = model.apply({"params": params}, **batch)

    A dropped layer returns its input. The kernels that read pruned heads and neurons read zeros. Pruned dimensions of the
    hidden state are zeros wherever a module writes them, and norms are over the kept dimensions alone. A jitted function that
    is called in a block is compiled anew for every block.

    Args:
      model: of this library, as from `load_pretrained`; the calls in the block are of this model.
      kept: as from `dsee_jax.prune.select`, True = kept.

    Raises:
      InputError: ``kept`` is no tree of kept units or does not fit the model, no call of the model in the block, or updates
        are attached already.
    """
    compaction.indices(model, kept)
    wide = None if "hidden" not in kept else np.asarray(kept["hidden"])
    axes, writers = models.hidden_axes(model), set[str]()
    if wide is not None:
        # The last axis of a param is that of the outputs.
        last = {path: len(names) - 1 for path, names in models.logical_axes(model).items()}
        writers = {path.rpartition("/")[0] for path, own in axes.items() if last[path] in own}
    stay = layers.names(kept["layers"]) if "layers" in kept else None
    whole = stay is None and wide is None
    expected, reached = [] if whole else [layer(number) for number in range(layers.depth(model.config))], set[str]()
    coefficients = {kind: part for kind, part in kept.items() if kind in models.cuts(model)}

    def intercept(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, output = context.module, call(*args, **kwargs)
        if context.method_name != "__call__" or module.scope is None or not module.path:
            return output
        if wide is not None and "/".join(module.path) in writers:
            norm = isinstance(module, LayerNorm | RmsNorm)
            return _normalised(module, args[0], wide) if norm else jnp.where(wide, output, jnp.zeros((), output.dtype))
        if (name := module.path[-1]) not in expected:
            return output
        reached.add(name)
        # A dropped layer runs all the same, as updates count the modules that read them; a compiler drops it.
        return output if stay is None or name in stay else module.skip(*args, **kwargs)

    with (
        earlybert.traced_anew(),
        earlybert.attached(coefficients, models.cuts(model)),
        intercepted(intercept),
    ):
        yield
    if missed := [name for name in expected if name not in reached]:
        raise InputError(
            f"the block of the masked model ran no {shorten(', '.join(missed))}: call the model in the block, with all layers"
        )


def _normalised(module: LayerNorm | RmsNorm, x: jax.Array, kept: np.ndarray) -> jax.Array:
    """Return the norm of ``x`` (..., width) over the kept dimensions, zeros at the others."""
    at = np.flatnonzero(kept)
    scale = module.get_variable("params", "scale")[at]
    if isinstance(module, LayerNorm):
        y = layer_norm(x[..., at], scale, module.get_variable("params", "bias")[at], module.epsilon)
    else:
        y = rms_norm(x[..., at], scale, module.epsilon)
    return jnp.zeros(x.shape, module.dtype).at[..., at].set(y.astype(module.dtype))
