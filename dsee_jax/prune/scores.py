"""Scores of the weights of one kernel; pruning removes the lowest (DSEE, arXiv 2111.00160, section 3.3).

With the update ``D = scale * (A @ B + S)`` of a kernel ``W``:

======  ==========================
W       ``|W|``
WAB     ``|W + scale * A @ B|``
WABS    ``|W + D|``
AB      ``|scale * A @ B|``
ABS     ``|D|``
NAB     ``1 / |scale * A @ B|``
NABS    ``1 / |D|``
WANDA   ``|W|`` times the root mean square of the input that it multiplies
random  uniform in [0, 1)
======  ==========================

WANDA is the score of Sun et al. 2023 (arXiv 2306.11695, equation 1). The paper multiplies by the norm of the input, which is
the root mean square up to a constant factor. The inputs are those of the current model before this pruning, in every layer
(`dsee_jax.prune.calibration.sizes`); the authors' code prunes layer by layer, each measured behind the pruned ones, so
their masks of deep layers differ by some percent. WANDA leaves out the update, because pruning sets W to 0 and keeps D.
In ``WABS`` the code of the authors of DSEE scales S alone, by a slip of operator precedence; here A @ B is scaled too.
A score that is not a number counts as the lowest (see `dsee_jax.ops.topk.ordered`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict, TypeVar

import jax
import jax.numpy as jnp

from dsee_jax import prng
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Array, Key

T = TypeVar("T")


class Evidence(TypedDict, total=False):
    """Keyword arguments of every function that scores: the values a score may read besides kernels and their updates."""

    key: Key | None
    """For ``random``; folded with the number of the kernel, or of the kind of units and of the layer."""
    inputs: Mapping[str, Array] | None
    """For ``WANDA``: by path the sizes of the inputs of a kernel, (in,) or (layers, in): `dsee_jax.prune.calibration`."""


def complete(function: str, evidence: Evidence) -> tuple[Key | None, Mapping[str, Array] | None]:
    """Return key and inputs; ``function`` is the name of the caller.

    Raises:
      TypeError: another keyword.
      InputError: ``key`` is no PRNG key, or ``inputs`` is no mapping.
    """
    for name in evidence.keys() - Evidence.__annotations__.keys():
        near = did_you_mean(name, Evidence.__annotations__)
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{near}")
    key, inputs = evidence.get("key"), evidence.get("inputs")
    if key is not None:
        prng.check(key)
    if inputs is not None and not isinstance(inputs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"inputs is of the type {type(inputs).__name__}; expected a mapping of the path of each kernel to the sizes of "
            "its inputs: pass the result of dsee_jax.prune.calibration.sizes"
        )
    return key, inputs


class Score(NamedTuple):
    """A score of the weights of one kernel."""

    function: Callable[..., jax.Array]
    """Takes the arguments that ``reads`` names, in that order."""
    reads: tuple[str, ...]
    """The arguments of `__call__` that the score depends on."""
    of_units: bool = True
    """Whether the sum over the weights of a head or neuron is a score of that head or neuron."""

    @property
    def reads_update(self) -> bool:
        """Whether the score depends on the update of the kernel."""
        return "low_rank" in self.reads or "update" in self.reads

    @property
    def of_update(self) -> bool:
        """Whether the score is one of the update alone, which no score of a weight compares with."""
        return self.reads_update and "w" not in self.reads

    def __call__(
        self, w: Array, low_rank: Array, update: Array, *, key: Key | None = None, inputs: Array | None = None
    ) -> jax.Array:
        """Return the scores, float32 of the shape of ``w``, never negative.

        Args:
          w: the kernel, (in, out) or (layers, in, out).
          low_rank: ``scale * A @ B``, dense.
          update: D, dense.
          key: for ``random``.
          inputs: for ``WANDA``: the root mean square of each input, (in,) or (layers, in).

        Raises:
          InputError: the score needs a key or inputs, and there are none.
        """
        arguments = {"w": w, "low_rank": low_rank, "update": update, "key": key, "inputs": inputs}
        return self.function(*(arguments[name] for name in self.reads))


def _magnitude(*arrays: Array) -> jax.Array:
    """Return the magnitude of a sum, in float32."""
    return jnp.abs(sum(jnp.asarray(array, jnp.float32) for array in arrays))


def _inverse(array: Array) -> jax.Array:
    return 1 / _magnitude(array)


def _wanda(w: Array, inputs: Array | None) -> jax.Array:
    if inputs is None:
        raise InputError(
            "the score 'WANDA' needs the sizes of the inputs: pass inputs=dsee_jax.prune.calibration.sizes(...)"
        )
    return _magnitude(w) * inputs[..., None]


def _random(w: Array, key: Key | None) -> jax.Array:
    if key is None:
        raise InputError("the score 'random' needs a key: pass key=jax.random.key(seed)")
    return jax.random.uniform(key, w.shape)


SCORES = {
    "W": Score(_magnitude, ("w",)),
    "WAB": Score(_magnitude, ("w", "low_rank")),
    "WABS": Score(_magnitude, ("w", "update")),
    "AB": Score(_magnitude, ("low_rank",)),
    "ABS": Score(_magnitude, ("update",)),
    "NAB": Score(_inverse, ("low_rank",), of_units=False),
    "NABS": Score(_inverse, ("update",), of_units=False),
    "WANDA": Score(_wanda, ("w", "inputs"), of_units=False),
    "random": Score(_random, ("w", "key")),
}
"""Every score by name; NAB and NABS of 0 are infinite."""


def divided(members: Sequence[T], updated: Callable[[T], bool], score: str) -> list[list[T]]:
    """Return the members of a pool in groups whose scores compare: one group, or those with an update and those without.

    A member without an update scores ``W`` where the score is one of the update alone. No group is empty.
    """
    if not SCORES[score].of_update:
        return [list(members)]
    groups = [[each for each in members if updated(each) == whether] for whether in (True, False)]
    return [group for group in groups if group]
