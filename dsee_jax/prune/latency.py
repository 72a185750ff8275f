"""The measured time of a forward pass by the width of its layers.

The whole model is timed, compiled for one device, with all layers cut to the same number of heads, and then to the same number
of neurons. A difference between two widths belongs in equal parts to the layers that lose units, except the last layer, whose
units are timed by themselves. Times between the measured widths are interpolated. The times of heads and of neurons are scaled
by one factor, so that they add up to the difference between the whole model and the model without any. Fewer hidden dimensions
are timed at a few widths, with all units and without any. The values of the arrays do not matter: neither weights nor data are
read.
"""

import math
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # which imports its submodules at their first use

from dsee_jax import models
from dsee_jax.models.architecture import Model

POINTS = 7
"""The widths of each kind of units that are timed, at equal distances from 0 to all units."""

WIDTHS = 4
"""The hidden widths that are timed, at equal distances up to the full one."""

ROUNDS = 9
"""The rounds of a measurement. Each round times every width once, right after the whole model: the time of a width is the
median of these ratios, so that a slow minute slows both."""

SHORTEST = 0.02
"""Seconds: the forward passes of one timing are repeated until they take as long."""


class Latency(NamedTuple):
    """Seconds of one forward pass of a batch."""

    rows: int
    length: int
    device: str
    widths: Mapping[str, Sequence[int]]
    """The units of each layer of the whole model, by kind."""
    seconds: float
    """Of the whole model."""
    empty: float
    """Of the model without heads and neurons, its layers present."""
    one: float
    """Of the model without heads and neurons and with one layer; that of `empty` where layers are not measured."""
    last: Mapping[str, float]
    """``{kind: seconds}``: of the model whose last layer has no units of this kind. A classifier may compute one position of
    its last layer, which then costs less than the others."""
    points: Mapping[str, Mapping[int, float]]
    """``{kind: {units: seconds}}``: of the model with at most so many units of this kind in every layer."""
    narrow: Mapping[int, tuple[float, float]] = types.MappingProxyType({})
    """``{hidden width: (seconds, seconds)}``: of the model with all units and of the one without any. Empty where hidden
    dimensions are not measured."""

    def layer_seconds(self, kind: str, number: int, size: int) -> np.ndarray:
        """Return the seconds that layer ``number`` adds by 0 to ``size`` units, (size + 1,); the first is 0."""
        every = {each: sum(self._alone(each, width)[-1] for width in widths) for each, widths in self.widths.items()}
        together, apart = max(self.seconds - self.empty, 0.0), sum(every.values())
        last = len(self.widths[kind]) - 1
        share = min(max(self.seconds - self.last[kind], 0.0), every[kind]) if last else every[kind]
        alike = self._alone(kind, self.widths[kind][last])[-1]
        own, equal = (share, alike) if number == last else (every[kind] - share, every[kind] - alike)
        factor = (own / equal if equal else 0.0) * (together / apart if apart else 0.0)
        return self._alone(kind, size) * factor

    def _alone(self, kind: str, size: int) -> np.ndarray:
        """Return the `layer_seconds` where all layers are alike and the units of the other kind all present."""
        at = np.array(sorted(self.points[kind]))
        # A wider model that is measured faster is noise.
        times = scipy.optimize.isotonic_regression([self.points[kind][point] for point in at]).x
        widths = np.array(self.widths[kind])
        per_unit = [
            (right - left) / np.sum(np.clip(widths, low, high) - low)
            for low, high, left, right in zip(at, at[1:], times, times[1:], strict=False)
        ]
        kept = np.arange(size + 1)
        parts = zip(at, at[1:], per_unit, strict=False)
        return sum(((np.clip(kept, low, high) - low) * each for low, high, each in parts), np.zeros(size + 1))

    def of_width(self, width: int) -> "Latency":
        """Return the times of the model with ``width`` hidden dimensions.

        The times of the model with all units and without any are interpolated between the measured widths. All other times
        lie between the two as they do at the full width. Below the least measured width the times are those at it.
        """
        at = sorted(self.narrow)
        # A narrower model that is measured slower is noise.
        whole, empty = (
            float(np.interp(width, at, scipy.optimize.isotonic_regression([self.narrow[each][part] for each in at]).x))
            for part in (0, 1)
        )
        units = max(self.seconds - self.empty, 0.0)
        factor = max(whole - empty, 0.0) / units if units else 0.0

        def narrowed(seconds: float) -> float:
            return empty + (seconds - self.empty) * factor

        return self._replace(
            seconds=whole,
            empty=empty,
            one=self.one * empty / self.empty,
            last={kind: narrowed(seconds) for kind, seconds in self.last.items()},
            points={
                kind: {point: narrowed(seconds) for point, seconds in each.items()}
                for kind, each in self.points.items()
            },
        )

    def rest_of_layer(self) -> float:
        """Return the seconds that a layer adds besides its units; 0 where layers are not measured."""
        depth = max(map(len, self.widths.values()))
        rest = max(self.empty - self.one, 0.0) / (depth - 1) if depth > 1 else 0.0
        return min(rest, self.empty / depth)

    def as_json(self) -> dict[str, Any]:
        """Return the times as JSON values, the inverse of `from_json`."""
        return self._asdict() | {"narrow": dict(self.narrow)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Latency":
        """Read the result of `as_json`, whose keys JSON has turned into text."""
        points = {kind: {int(at): seconds for at, seconds in each.items()} for kind, each in value["points"].items()}
        widths = {kind: tuple(each) for kind, each in value["widths"].items()}
        narrow = {int(at): (whole, empty) for at, (whole, empty) in value.get("narrow", {}).items()}
        return cls(**{**value, "widths": widths, "points": points, "narrow": narrow})


def measure(
    model: Model,
    *,
    rows: int,
    length: int,
    param_dtype: str = "float32",
    layers: bool = False,
    hidden: bool = False,
    rounds: int = ROUNDS,
) -> Latency:
    """Time the forward pass of a model of this library at several widths, on the first local device.

    Args:
      model: the whole model; its layers may differ in width.
      rows: examples of a batch.
      length: tokens of an example.
      param_dtype: of the weights; the products run in the dtype of the model.
      layers: time the model without layers too.
      hidden: time the model at `WIDTHS` hidden widths too, with all units and without any.
      rounds: timings of each width, 1 or more.
    """
    widths = model.config.widths
    points = {
        kind: sorted({round(max(each) * part / (POINTS - 1)) for part in range(POINTS)})
        for kind, each in widths.items()
    }

    def with_widths(kind: str, each: Sequence[int]) -> Model:
        return model.clone(config=model.config.with_widths(**widths | {kind: tuple(each)}))

    cut: dict[tuple[str, int | str], Model] = {
        (kind, point): with_widths(kind, [min(width, point) for width in widths[kind]])
        for kind, each in points.items()
        for point in each
        if point < max(widths[kind])
    }
    config, depth = model.config, max(map(len, widths.values()))
    empty = config.with_widths(**dict.fromkeys(widths, (0,) * depth))
    cut |= {(kind, "last"): with_widths(kind, (*each[:-1], 0)) for kind, each in widths.items()}
    cut["empty", 0] = model.clone(config=empty)
    if layers:
        cut["one", 0] = model.clone(config=empty.with_layers([not number for number in range(depth)]))
    full = model.config.hidden_size
    narrower = sorted({max(round(full * part / WIDTHS), 1) for part in range(1, WIDTHS)} - {full}) if hidden else []
    for width in narrower:
        own = model.config.with_hidden(width)
        cut["whole", width] = model.clone(config=own.with_widths(**widths))
        cut["nothing", width] = model.clone(config=own.with_widths(**dict.fromkeys(widths, (0,) * depth)))
    options: dict[str, Any] = {"rows": rows, "length": length, "param_dtype": param_dtype, "rounds": rounds}
    first, *others = times([model, *cut.values()], **options)
    of = dict(zip(cut, others, strict=True))
    measured = {kind: {point: of.get((kind, point), first) for point in each} for kind, each in points.items()}
    last = {kind: of[kind, "last"] for kind in widths}
    narrow = {width: (of["whole", width], of["nothing", width]) for width in narrower}
    return Latency(
        rows,
        length,
        jax.local_devices()[0].device_kind,
        widths,
        first,
        of["empty", 0],
        of.get(("one", 0), of["empty", 0]),
        last,
        measured,
        narrow | {full: (first, of["empty", 0])} if hidden else {},
    )


def times(
    each: Sequence[Model], *, rows: int, length: int, param_dtype: str = "float32", rounds: int = ROUNDS
) -> list[float]:
    """Return the seconds of a forward pass of each model, by medians (`ROUNDS`); two models or more, the whole one first.

    Arguments as of `measure`.
    """
    device = jax.local_devices()[0]
    batch = {name: jnp.ones((rows, length), jnp.int32, device=device) for name in models.INPUTS}
    batch["token_type_ids"] = jnp.zeros_like(batch["token_type_ids"])

    def timer(model: Model) -> Callable[[], Callable[[int], float]]:
        run, shapes = _program(model, batch, param_dtype)

        def ready() -> Callable[[int], float]:
            params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype, device=device), shapes)
            jax.block_until_ready(run(params, batch))  # warms the caches
            return lambda repeats: _seconds(run, params, batch, repeats)

        return ready

    whole, *others = [timer(model) for model in each]
    of_whole = whole()
    repeats = max(math.ceil(SHORTEST / of_whole(1)), 1)
    seconds: list[float] = []
    ratios: list[list[float]] = [[] for _ in others]
    for _ in range(rounds):
        for other, own in zip(others, ratios, strict=True):
            # Weights that stayed for all models would fill the memory.
            of_other = other()
            seconds.append(of_whole(repeats))
            own.append(of_other(repeats) / seconds[-1])
    first = float(np.median(seconds))
    return [first, *(first * float(np.median(own)) for own in ratios)]


def _program(model: Model, batch: Mapping[str, jax.Array], dtype: str) -> tuple[Callable[..., Any], Any]:
    """Return the compiled forward pass of a model and the shapes of its params."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), models.shapes(model))

    def forward(params: Any, batch: Mapping[str, jax.Array]) -> Any:
        return model.apply({"params": params}, **batch, deterministic=True)

    return jax.jit(forward).lower(shapes, batch).compile(), shapes


def _seconds(run: Callable[..., Any], params: Any, batch: Mapping[str, jax.Array], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(run(params, batch))
    return (time.perf_counter() - begin) / repeats
