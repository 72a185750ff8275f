"""The orientation of a kernel: the meaning of its axes, one word per axis, joined by ``_``.

::

    in_out          nn.Dense, nnx.Linear
    out_in          equinox.nn.Linear, torch.nn.Linear
    in_out_out      the query of Flax's attention: (width, heads, head size)
    in_in_out       the output of Flax's attention: (heads, head size, width)
    stack_in_out    the kernels of a scanned stack of layers, or of an ensemble
    1_1_in_out      a 1 x 1 convolution

Attached updates support a stack at the first or second axis only, since ``values`` has no axis for one elsewhere. For other
kernels use `dsee_jax.materialize`.

Updates, supports and scores are those of the matrix of a kernel, (stack..., in, out): all its input axes are one axis, and so
are all its output axes, in their order.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

from dsee_jax import stacks
from dsee_jax.auto_axes import Spec, auto_sharded, spec
from dsee_jax.errors import InputError
from dsee_jax.typing import Array

IN_OUT = "in_out"
STACKED = "stack_in_out"

USUAL = (IN_OUT, STACKED)
"""The orientations that need not be stated."""

WORDS = ("stack", "in", "out", "1")
"""A stack of kernels, an input axis, an output axis, an axis of length 1."""


def find(path: str, shape: Sequence[int], stated: str | None = None) -> str:
    """Return the orientation of the kernel at ``path``: the stated one, or the one that the path and two axes imply.

    A kernel (in, out) is `IN_OUT`; a ``bias`` of two axes, as in Flax's attention, is no kernel. A kernel of three axes below
    ``layers`` (`dsee_jax.stacks`) is `STACKED`.

    Raises:
      InputError: the orientation does not fit the axes, or it is not stated and three axes or more do not imply it.
    """
    if stated is None:
        if len(shape) == 2 and path.rpartition("/")[2] != "bias":
            return IN_OUT
        if len(shape) == 3 and stacks.is_stacked(path):
            return STACKED
        raise InputError(
            f"{path!r} has the shape {tuple(shape)}; an array that is no kernel (in, out) needs an orientation: give its rule "
            f"the value {{'orientation': ...}}, one of {', '.join(WORDS)} for each axis, such as 'in_out_out' for the "
            "query of Flax's attention"
        )
    words = stated.split("_") if isinstance(stated, str) else []
    unknown = [word for word in words if word not in WORDS]
    fits = words and not unknown and len(words) == len(shape) and "in" in words and "out" in words
    if not fits or any(word == "1" and size != 1 for word, size in zip(words, shape, strict=True)):
        raise InputError(
            f"the orientation of {path!r} is {stated!r} and its shape is {tuple(shape)}; expected one word for each axis, "
            f"of {', '.join(WORDS)} (of length 1), joined by '_', with at least one in and one out"
        )
    return stated


def at_use(orientation: str, axes: int) -> str:
    """Return the orientation of a kernel of ``axes`` axes inside of the loops over its leading stacks."""
    words = orientation.split("_")
    while len(words) > axes and "stack" in words:
        words.remove("stack")
    return "_".join(words)


def _order(orientation: str) -> list[int]:
    """Return the axes of a kernel in the order of its matrix; axes of length 1 come first."""
    words = orientation.split("_")
    return sorted(range(len(words)), key=lambda axis: ("1", "stack", "in", "out").index(words[axis]))


def matrix_shape(shape: Sequence[int], orientation: str) -> tuple[int, ...]:
    """Return the shape (stack..., in, out) of the matrix of a kernel of this shape."""
    words = orientation.split("_")
    sizes = {word: [size for size, own in zip(shape, words, strict=True) if own == word] for word in WORDS}
    return (*sizes["stack"], math.prod(sizes["in"]), math.prod(sizes["out"]))


def matrix(w: Array, orientation: str) -> Array:
    """Return the matrix (stack..., in, out) of a kernel; of a NumPy array, a NumPy array."""
    if orientation in USUAL:
        return w
    order, shape = _order(orientation), matrix_shape(w.shape, orientation)
    return auto_sharded(lambda w: w.transpose(order).reshape(shape), w, out=_matrix_spec(spec(w), orientation))


def _matrix_spec(kernel: Spec, orientation: str) -> Spec:
    """Return the spec of the matrix of a kernel: a joined axis is sharded like all of the axes that it joins."""
    names = {
        word: [own for own, of in zip(kernel, orientation.split("_"), strict=True) if of == word] for word in WORDS
    }
    return (*names["stack"], sum(names["in"], ()), sum(names["out"], ()))


def tensor(matrix: jax.Array, like: Array, orientation: str) -> jax.Array:
    """Return the array with this matrix and the axes of a kernel ``like`` it, the inverse of `matrix`."""
    if orientation in USUAL:
        return matrix
    order = _order(orientation)
    shape, places = [like.shape[axis] for axis in order], np.argsort(order).tolist()
    return auto_sharded(lambda matrix: matrix.reshape(shape).transpose(places), matrix, out=spec(like))
