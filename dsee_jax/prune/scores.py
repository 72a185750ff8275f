"""Scores of the weights of one kernel; pruning removes the lowest (DSEE, arXiv 2111.00160, section 3.3).

With the update ``D = scale * (A @ B + S)`` of a kernel ``W``:

========  ==========================
W         ``|W|``
WAB       ``|W + scale * A @ B|``
WABS      ``|W + D|``
AB        ``|scale * A @ B|``
ABS       ``|D|``
NAB       ``1 / |scale * A @ B|``
NABS      ``1 / |D|``
WANDA     ``|W|`` times the root mean square x of the input that it multiplies
RIA       ``|W| (1 / sum of |W| over its column + 1 / sum over its row) x^0.5``
MOVEMENT  ``-W G``
TAYLOR    ``|W| sqrt(mean of G_b^2)``
PLATON    ``|W| sqrt(E U)``
random    uniform in [0, 1)
========  ==========================

**Scores of inputs** read `dsee_jax.prune.calibration.sizes`. WANDA is the score of Sun et al. 2023 (arXiv 2306.11695,
equation 1). The paper multiplies by the norm of the input, which is the root mean square up to a constant factor. RIA is that
of Zhang et al. 2024 (Plug-and-Play, ICLR 2024, section 3): the size of a weight relative to those of the same input and of the
same output. Here each kernel has a constant factor more, so that the scores of kernels of all sizes compare: the first part
times ``in * out / (in + out)``, which makes its mean 1, and x over its root mean square in the kernel. A row or a column of
zeros scores 0.

**Scores of gradients** read `dsee_jax.prune.gradients.measure`: G is the gradient of the loss of the real labels with respect
to the effective kernel ``W + D``, which is also that with respect to W. MOVEMENT is ``-sum of W G`` over micro-batches, the
score that movement pruning learns under plain gradient descent (Sanh et al. 2020, arXiv 2005.07683), in one pass with fixed
weights; it may be negative. TAYLOR is the first-order change of the loss without the weight, squared for each micro-batch b,
averaged, and the root taken (Molchanov et al. 2019, arXiv 1906.10771); the sum of the signed changes would say little after
tuning, where gradients average to about 0. PLATON multiplies the moving average E of the sensitivity ``|W G_b|`` by that of
its uncertainty U (Zhang et al. 2022, arXiv 2206.12562); the root changes no order.

Scores of inputs and of gradients leave out the update, because pruning sets W to 0 and keeps D. In ``WABS`` the code of the
authors of DSEE scales S alone, by a slip of operator precedence; here A @ B is scaled too. A score that is not a number counts
as the lowest (see `dsee_jax.ops.topk.ordered`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import jax
import jax.numpy as jnp

from dsee_jax import prng
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Array, Delta, Key

T = TypeVar("T")


class Evidence(TypedDict, total=False):
    """Keyword arguments of every function that scores: the values a score may read besides kernels and their updates."""

    key: Key | None
    """For ``random``; folded with the number of the kernel, or of the kind of units and of the layer."""
    inputs: Mapping[str, Array] | None
    """For ``WANDA`` and ``RIA``: by path the sizes of the inputs of a kernel, (in,) or (layers, in):
    `dsee_jax.prune.calibration.sizes`."""
    gradients: Mapping[str, Array] | None
    """For ``MOVEMENT``, ``TAYLOR`` and ``PLATON``: by path the statistic of the gradients of a kernel, in its shape:
    `dsee_jax.prune.gradients.measure`."""


_MAKERS = {
    "inputs": "dsee_jax.prune.calibration.sizes(model, params, batches)",
    "gradients": "dsee_jax.prune.gradients.measure(loss, params, paths, batches, statistic=...)",
}
"""The calls that return the values of `Evidence` by path."""


def complete(function: str, evidence: Evidence) -> dict[str, Any]:
    """Return all values of `Evidence`, None for those not given; ``function`` is the name of the caller.

    Raises:
      TypeError: another keyword.
      InputError: ``key`` is no PRNG key, or ``inputs`` or ``gradients`` is no mapping.
    """
    for name in evidence.keys() - Evidence.__annotations__.keys():
        near = did_you_mean(name, Evidence.__annotations__)
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{near}")
    values: dict[str, Any] = {name: evidence.get(name) for name in Evidence.__annotations__}
    if values["key"] is not None:
        prng.check(values["key"])
    for name, maker in _MAKERS.items():
        if values[name] is not None and not isinstance(values[name], Mapping):
            raise InputError(
                f"{name} is of the type {type(values[name]).__name__}; expected a mapping of the path of each kernel to an "
                f"array: pass {name}={maker}"
            )
    return values


def check_low_rank(path: str, score: str, delta: Delta) -> None:
    """Raise `InputError` for a score of the update alone of an update of sparse values alone: all other entries score 0."""
    if SCORES[score].of_update and "a" not in delta:
        raise InputError(
            f"the score {score!r} needs a low-rank update; that of {path!r} has sparse values alone: use W or WABS"
        )


def of_kernel(
    path: str, shapes: Mapping[str, tuple[int, ...]], score: str, evidence: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arrays of the evidence that ``score`` reads of the kernel at ``path``, by the names of `Evidence`.

    ``shapes`` are the expected shapes. Raises `InputError`, with the function that makes the evidence, where there is no array
    of its shape.
    """
    arrays: dict[str, Any] = {}
    for name in SCORES[score].reads:
        if name not in _MAKERS:
            continue
        array = (evidence[name] or {}).get(path)
        if array is None or tuple(array.shape) != shapes[name]:
            raise InputError(
                f"the score {score!r} of {path!r} needs {name} of the shape {shapes[name]}; found "
                f"{'nothing' if array is None else array.shape}: pass {name}={_MAKERS[name]}"
            )
        arrays[name] = array
    return arrays


class Score(NamedTuple):
    """A score of the weights of one kernel."""

    function: Callable[..., jax.Array]
    """Takes the arguments that ``reads`` names, in that order."""
    reads: tuple[str, ...]
    """The arguments of `__call__` that the score depends on."""
    of_units: bool = True
    """Whether the sum over the weights of a head or neuron is a score of that head or neuron."""
    statistic: str = ""
    """The statistic of gradients that the score reads (`dsee_jax.prune.gradients.STATISTICS`)."""

    @property
    def reads_update(self) -> bool:
        """Whether the score depends on the update of the kernel."""
        return "low_rank" in self.reads or "update" in self.reads

    @property
    def of_update(self) -> bool:
        """Whether the score is one of the update alone, which no score of a weight compares with."""
        return self.reads_update and "w" not in self.reads

    def __call__(
        self,
        w: Array,
        low_rank: Array,
        update: Array,
        *,
        key: Key | None = None,
        inputs: Array | None = None,
        gradients: Array | None = None,
    ) -> jax.Array:
        """Return the scores, float32 of the shape of ``w``; only ``MOVEMENT`` is negative anywhere.

        Args:
          w: the kernel, (in, out) or (layers, in, out).
          low_rank: ``scale * A @ B``, dense.
          update: D, dense.
          key: for ``random``.
          inputs: for ``WANDA`` and ``RIA``: the root mean square of each input, (in,) or (layers, in).
          gradients: for ``MOVEMENT``, ``TAYLOR`` and ``PLATON``: the `statistic`, shaped like ``w``.

        Raises:
          InputError: the score reads a key, inputs or gradients, and there are none.
        """
        arguments = {"w": w, "low_rank": low_rank, "update": update, "key": key}
        arguments |= {"inputs": inputs, "gradients": gradients}
        for name in self.reads:
            if arguments[name] is None:
                wanted, maker = ("a key", "jax.random.key(seed)") if name == "key" else (name, _MAKERS[name])
                raise InputError(f"the score needs {wanted}: pass {name}={maker}")
        return self.function(*(arguments[name] for name in self.reads))


def _magnitude(*arrays: Array) -> jax.Array:
    """Return the magnitude of a sum, in float32."""
    return jnp.abs(sum(jnp.asarray(array, jnp.float32) for array in arrays))


def _inverse(array: Array) -> jax.Array:
    return 1 / _magnitude(array)


def _wanda(w: Array, inputs: Array) -> jax.Array:
    return _magnitude(w) * inputs[..., None]


def _ria(w: Array, inputs: Array) -> jax.Array:
    size, (rows, columns) = _magnitude(w), w.shape[-2:]
    relative = sum(_over(size, jnp.sum(size, axis=axis, keepdims=True)) for axis in (-2, -1))
    mean = jnp.sqrt(jnp.mean(jnp.square(inputs), axis=-1, keepdims=True))
    return relative * (rows * columns / (rows + columns)) * jnp.sqrt(_over(inputs, mean))[..., None]


def _over(part: Array, whole: Array) -> jax.Array:
    """Return ``part / whole``, 0 where the whole is 0."""
    return jnp.where(whole == 0, 0.0, part / jnp.where(whole == 0, 1.0, whole))


def _movement(w: Array, gradients: Array) -> jax.Array:
    return -jnp.asarray(w, jnp.float32) * gradients


def _sensitivity(w: Array, gradients: Array) -> jax.Array:
    return _magnitude(w) * jnp.abs(gradients)


def _random(w: Array, key: Key) -> jax.Array:
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
    "RIA": Score(_ria, ("w", "inputs"), of_units=False),
    "MOVEMENT": Score(_movement, ("w", "gradients"), of_units=False, statistic="mean"),
    "TAYLOR": Score(_sensitivity, ("w", "gradients"), of_units=False, statistic="root_mean_square"),
    "PLATON": Score(_sensitivity, ("w", "gradients"), of_units=False, statistic="platon"),
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
