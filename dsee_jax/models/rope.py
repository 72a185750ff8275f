"""Rotary position embeddings (arXiv 2104.09864) with the scalings of their frequencies, under Hugging Face's names."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.errors import InputError, did_you_mean

NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""The required parameters of each scaling."""

READ: dict[str, tuple[str, ...]] = {
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
"""The optional parameters of each scaling."""

_MOST = 1e15
"""The largest value of a parameter, and of its inverse."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rope:
    """``rope_parameters`` of a ``config.json``."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    """The ratio of the longest text to the longest text of the pretraining."""
    original_max_position_embeddings: int | None = None
    """llama3, yarn: the length of the pretraining. None: max_position_embeddings."""
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    """yarn: multiplies cosines and sines. None: 0.1 ln(factor) + 1."""
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


DEFAULT = Rope()
"""No scaling."""


def read(config: Mapping[str, Any]) -> tuple[Rope, dict[str, Any]]:
    """Return the rotary parameters of a ``config.json``, in the present or an earlier layout, and the other fields.

    Raises:
      InputError: a scaling that is not implemented, a parameter that is missing, unknown or no number, or two fields that
        contradict one another. A parameter of another scaling is named by a warning.
    """
    rest = {
        name: value for name, value in config.items() if name not in ("rope_parameters", "rope_scaling", "rope_theta")
    }
    places = [
        config,
        *(place for name in ("rope_scaling", "rope_parameters") if isinstance(place := config.get(name), Mapping)),
    ]
    thetas = [place["rope_theta"] for place in places if place.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas):
        raise InputError(f"'rope_theta' is {' and '.join(map(repr, thetas))}: keep the intended value")
    theta = thetas[0] if thetas else Rope.rope_theta
    fields = [field for field in ("rope_scaling", "rope_parameters") if config.get(field)] or ["rope_parameters"]
    first, *others = [_parse(field, config, theta) for field in fields]
    if others and others[0] != first:
        raise InputError(
            f"'rope_scaling' is {config['rope_scaling']!r} and 'rope_parameters' {config['rope_parameters']!r}: "
            "keep the intended one"
        )
    return first, rest


def _parse(field: str, config: Mapping[str, Any], theta: Any) -> Rope:
    parameters = config.get(field) or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"{field!r} is {parameters!r}; expected an object of parameters")
    parameters = dict(parameters)
    kind = parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.pop("type", None)
    parameters["rope_theta"] = theta
    if parameters.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise InputError(f"{field!r}: 'partial_rotary_factor' is not implemented; only 1.0 is")
    if not isinstance(kind, str) or kind not in NEEDED:
        raise InputError(
            f"{field!r}: 'rope_type' {kind!r} is not implemented{did_you_mean(str(kind), NEEDED)}; "
            f"implemented: {', '.join(NEEDED)}"
        )
    names = {each.name for each in dataclasses.fields(Rope)}
    for name, value in parameters.items():
        if name not in names:
            raise InputError(f"{field!r}: unknown parameter {name!r}{did_you_mean(name, names)}")
        if name == "truncate":
            if value is not None and type(value) is not bool:
                raise InputError(f"{field!r}: {name!r} is {value!r}; expected true or false")
        elif (
            name != "rope_type"
            and value is not None
            and (type(value) not in (int, float) or not 1 / _MOST < value < _MOST)
        ):
            raise InputError(
                f"{field!r}: {name!r} is {value!r:.80}; expected a number above 0, from {1 / _MOST:.0e} to {_MOST:.0e}"
            )
    unread = parameters.keys() - {"rope_type", "rope_theta", *NEEDED[kind], *READ.get(kind, ())}
    if unread := sorted(name for name in unread if parameters[name] is not None):
        log.warning("%r: 'rope_type' %r does not read %s", field, kind, ", ".join(map(repr, unread)))
    for name in NEEDED[kind]:
        if parameters.get(name) is None:
            raise InputError(f"{field!r}: {name!r} is missing; 'rope_type' {kind!r} needs a value")
    if kind == "llama3" and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
        raise InputError(
            f"{field!r}: 'high_freq_factor' is not above 'low_freq_factor'; 'rope_type' 'llama3' needs that"
        )
    if not theta > 1:
        raise InputError(f"'rope_theta' is {theta!r}; expected a number above 1")
    return Rope(**parameters)


def earlier(rope: Rope) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling`` as transformers 4 reads them; the latter is None without a scaling."""
    given = {name: value for name, value in dataclasses.asdict(rope).items() if value is not None}
    theta, kind = given.pop("rope_theta"), given.pop("rope_type")
    # Before 4.43 a scaling was {"type", "factor"}, and any other field an error.
    name = "type" if kind in ("linear", "dynamic") else "rope_type"
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {name: kind} | given}


def longest(rope: Rope, most: int) -> int:
    """Return the longest text of scaled positions; ``most`` is max_position_embeddings.

    With llama3, and in some files with yarn, ``most`` is already the scaled length.
    """
    if rope.rope_type in ("linear", "dynamic"):
        return int(most * max(rope.factor or 1.0, 1.0))
    if rope.rope_type == "yarn":
        return max(most, int((rope.factor or 1.0) * (rope.original_max_position_embeddings or most)))
    return most


def rotation(rope: Rope, positions: jax.Array, head_size: int, most: int) -> tuple[jax.Array, jax.Array]:
    """Return the cosines and sines, float32 (batch, length, 1, head_size / 2) each, of int ``positions`` (batch, length).

    ``most`` is max_position_embeddings. With ``dynamic``, the base of all rows grows once any position exceeds it.
    """
    powers = np.arange(0, head_size, 2) / head_size
    factor, theta = rope.factor or 1.0, rope.rope_theta
    original, amplitude = rope.original_max_position_embeddings or most, 1.0
    frequencies: Any = theta**-powers
    if rope.rope_type == "linear":
        frequencies = frequencies / factor
    elif rope.rope_type == "dynamic":
        length = jnp.maximum(jnp.max(positions) + 1, most).astype(jnp.float32)
        base = theta * (factor * length / most - (factor - 1)) ** (head_size / (head_size - 2))
        frequencies = base ** -jnp.asarray(powers, jnp.float32)
    elif rope.rope_type == "llama3":
        low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
        # Frequencies with few turns in the length of the pretraining are slowed down, those with many turns are not.
        share = np.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
        frequencies = (1 - share) * frequencies / factor + share * frequencies
    elif rope.rope_type == "yarn":
        frequencies, amplitude = _yarn(rope, frequencies, head_size, original)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    return amplitude * jnp.cos(angles)[:, :, None], amplitude * jnp.sin(angles)[:, :, None]


def _yarn(rope: Rope, frequencies: np.ndarray, head_size: int, original: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, sections 3.2 and 3.4)."""
    factor = rope.factor or 1.0

    def pair(turns: float) -> float:
        return head_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair(rope.beta_fast or 32), pair(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    slowed = np.clip((np.arange(head_size // 2) - low) / (high - low or 0.001), 0, 1)

    def amplitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.attention_factor
    if scale is None:
        both = rope.mscale and rope.mscale_all_dim
        scale = amplitude(rope.mscale or 1) / amplitude(rope.mscale_all_dim or 1) if both else amplitude(1)
    return slowed * frequencies / factor + (1 - slowed) * frequencies, scale


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Return ``x`` (batch, length, heads, head size) rotated, in its dtype; the two halves of a head are the coordinates."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cosines - right * sines, right * cosines + left * sines], axis=-1).astype(x.dtype)
