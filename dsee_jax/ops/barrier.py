"""The identity that ends a fusion.

Between the products a residual stream has cheap elementwise operations only, and so has its gradient. On a CPU XLA fuses them
into each of their consumers, back through all layers before: reads and computations grow with the square of the depth. XLA
drops its own optimisation barriers before it fuses. It keeps a call that must not be inlined.
"""

import jax
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dsee_jax.typing import Array


def fusion_barrier(x: Array) -> jax.Array:
    """Return ``x``, any shape and dtype, which a program on a CPU writes to memory; its gradient likewise.

    For the input of each layer of an unrolled stack. On other devices the result is ``x`` alone. Differentiable in every mode.
    """
    return _barrier.bind(x)


_barrier = Primitive("fusion_barrier")
_barrier.def_impl(jax.numpy.asarray)
_barrier.def_abstract_eval(lambda x: x)
ad.deflinear(_barrier, lambda cotangent: [_barrier.bind(cotangent)])
batching.defvectorized(_barrier)


@jax.jit
def _computed(x: jax.Array) -> jax.Array:
    # A function that returns its argument is no call.
    return x * np.ones((), x.dtype)


def _called(x: jax.Array) -> jax.Array:
    with set_xla_metadata(inlineable="false"):
        return _computed(x)


mlir.register_lowering(_barrier, mlir.lower_fun(lambda x: x, multiple_results=False))
mlir.register_lowering(_barrier, mlir.lower_fun(_called, multiple_results=False), platform="cpu")
