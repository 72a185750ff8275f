"""The target of a cut in a run (``prune.target``): its costs, whether it can be met, the chosen units, the ratio reached."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsee_jax import models, tree
from dsee_jax.ckpt.folders import CONFIG, HASHES, LATENCY, read_json
from dsee_jax.errors import InputError
from dsee_jax.metrics import flops
from dsee_jax.models import hf_config
from dsee_jax.prune import budget, costs, earlybert, latency, units
from dsee_jax.prune.budget import Costs, Counts
from dsee_jax.prune.costs import Dimensions
from dsee_jax.prune.latency import Latency
from dsee_jax.runtime import files, multihost, storage
from dsee_jax.train.results import kept_numbers, trained_head
from dsee_jax.train.setup import Setup
from dsee_jax.train.step import adapter
from dsee_jax.typing import Array, Masks, Tree


def check(setup: Setup) -> None:
    """Raise `InputError` unless the target can be met with any scores, and needs a cut.

    The message names the smallest target that can be met, or the part of the dense model that the model is before a cut. For
    ``latency`` this measures the times, unless the folder of the run has them, and writes them there.
    """
    target = setup.config.prune.target
    if target.kind:
        alike: dict[str, Any] = dict(earlybert.init(models.cuts(setup.model), setup.params))
        alike["hidden"] = np.ones(setup.model.config.hidden_size)
        spent = of_setup(setup)
        _choices(setup, _scores(setup, alike, spent), spent, whichever=True)
        if budget.fits(now := float(spent.ratio({}).max()), target.budget):
            raise InputError(
                f"prune.target.{target.kind} is {target.budget:g} of the dense model, and this model, whose zeros cost "
                f"nothing, has {now:.4g} of it before a cut: use less than that"
            )


def of_setup(setup: Setup, hidden: np.ndarray | None = None, *, most: bool = False) -> Costs:
    """Return the costs of the unpruned model of a run that its target bounds.

    Args:
      setup: of the run.
      hidden: bool (width,); the costs are those of the model with these hidden dimensions alone. bool (models, width): those
        of several models. None: all dimensions.
      most: bound the costs for all choices of as many dimensions as ``hidden`` has.
    """
    target, cuts = setup.config.prune.target, models.cuts(setup.model)
    updates = adapter(setup.trained, setup.supports, setup.config.delta)
    if target.kind == "latency":
        return costs.latency(_measured(setup), setup.params, cuts, width=0 if hidden is None else hidden.sum(-1))
    options = {} if hidden is None else {"hidden": Dimensions(models.hidden_axes(setup.model), hidden, most)}
    if target.kind == "parameters":
        backbone = tree.flatten(setup.params).keys() - set(trained_head(setup))
        return costs.parameters(setup.params, updates, cuts, backbone, **options)
    matrices, trained = flops.kernels(setup.model, setup.params, set(setup.head)), tree.flatten(setup.trained["params"])
    length = setup.config.data.max_length
    return costs.flops(setup.params, updates, cuts, matrices, length=length, filled=trained, **options)


def balanced(setup: Setup, scores: Array, spent: Costs) -> np.ndarray:
    """Return `dsee_jax.prune.budget.balanced_hidden` scores of the hidden dimensions of a run, whose costs are ``spent``."""
    half = np.arange(len(scores)) < max(len(scores) // 2, 1)
    return budget.balanced_hidden(scores, spent, of_setup(setup, half), int(half.sum()))


def choose(setup: Setup, scores: Tree, spent: Costs) -> Masks:
    """Return the kept units of the highest score within the target; ``spent`` are the costs of all hidden dimensions.

    With ``prune.target.layers`` layers may go; where they have no scores, those of their units add up. With
    ``prune.target.hidden`` hidden dimensions may go. ``prune.uniform``: every layer keeps the same number. Where the numbers
    that config.json can hold are enough for the target, only these are chosen among. No narrower width is chosen that
    config.json cannot hold.
    """
    target, scores = setup.config.prune.target, _scores(setup, scores, spent)
    by_width, among = _choices(setup, scores, spent)
    options: dict[str, Any] = {"uniform": setup.config.prune.uniform}
    try:
        if target.hidden:
            return budget.choose_width(scores, by_width, target.budget, among=among, **options)
        return budget.choose(scores, spent, target.budget, among=among[setup.model.config.hidden_size], **options)
    except InputError as error:
        raise InputError(f"prune.target.{target.kind}: {error}") from None


def _scores(setup: Setup, scores: Tree, spent: Costs) -> dict[str, Any]:
    """Return the scores of the kinds of units that may go, with those of layers where they may."""
    target = setup.config.prune.target
    if target.layers and "layers" not in scores:
        scores = {**scores, **budget.with_layers(scores, spent)}
    kinds = [*models.cuts(setup.model), *(kind for kind in ("layers", "hidden") if getattr(target, kind))]
    return {kind: scores[kind] for kind in kinds}


def _choices(
    setup: Setup, scores: Tree, spent: Costs, *, whichever: bool = False
) -> tuple[dict[int, Costs], dict[int, Counts]]:
    """Return the costs, and the numbers of units to choose among, by hidden width; nothing is chosen yet.

    ``whichever``: a cut must fit whichever layer and hidden dimensions have the highest scores.

    Raises:
      InputError: the target cannot be met.
    """
    target, uniform, size = setup.config.prune.target, setup.config.prune.uniform, setup.model.config.hidden_size
    every: Counts = budget.counts(scores, multiple=target.multiple)
    widths = budget.widths(size, multiple=target.multiple) if target.hidden else [size]
    attempts: list[dict[int, Counts]] = [dict.fromkeys(widths, every)]
    if uniform:
        every = {kind: {name: each[1:] for name, each in layers.items()} for kind, layers in every.items()}
        held = _held(setup, every, widths)
        attempts = [each for each in (held, held | {size: every}) if each]
    by_width = {size: spent}
    if narrower := [width for width in attempts[0] if width < size]:
        flags = budget.dimensions(scores["hidden"], narrower)
        by_width |= zip(narrower, of_setup(setup, flags, most=whichever).models(), strict=True)
    ways = [scores]
    if whichever and uniform and "layers" in scores:
        ways = [{**scores, "layers": best} for best in np.eye(len(scores["layers"]))]

    def least_of(way: Tree, among: dict[int, Counts]) -> float:
        each = (budget.least(way, by_width[width], among=own, uniform=uniform) for width, own in among.items())
        return min(each)

    least = np.inf
    for among in attempts:
        if budget.fits(least := max(least_of(way, among) for way in ways), target.budget):
            return by_width, among
    raise InputError(f"prune.target.{target.kind}: {budget.too_small(target.budget, least, [*scores])}")


def _held(setup: Setup, among: Counts, widths: Sequence[int]) -> dict[int, Counts]:
    """Return the choices of ``among`` that the standard fields of config.json can hold, by hidden width.

    Besides ``widths`` there are those that a number of heads fills. The full width is left out where no choice can be held.
    """
    config, every = setup.model.config, set(widths)
    if len(widths) > 1:
        multiple = setup.config.prune.target.multiple or 1
        filled = range(config.head_size, config.hidden_size, config.head_size)
        every |= {size for size in filled if size % multiple == 0}
    held: dict[int, Counts] = {}
    for size in every:
        own = config if size == config.hidden_size else config.with_hidden(size)
        choices = {
            kind: {
                name: [number for number in each if units.standard(own, kind, number)] for name, each in layers.items()
            }
            for kind, layers in among.items()
        }
        if all(each for layers in choices.values() for each in layers.values()):
            held[size] = choices
    return held


def record(before: Setup, after: Setup) -> dict[str, Any]:
    """Return the record of a cut for the log and ``metrics.json``: the units that each layer keeps; with a target, its ratio.

    Under ``target``, ``reached`` is the highest of the costs that the target bounds, by the tables of costs; for ``latency``
    ``measured`` is the ratio of two times that are measured in turns, of the cut and of the unpruned model.
    """
    target, cut = before.config.prune.target, {"kept": kept_numbers(after)}
    if not target.kind:
        return cut
    if before.config.prune.uniform and hf_config.kept_kinds(after.model.config):
        for kind, widths in after.model.config.widths.items():
            units.warn_unless_standard(before.model.config, kind, widths[0])
    units_kept = {kind: part for kind, part in after.kept.items() if kind != "hidden"}
    ratio = float(of_setup(before, after.kept.get("hidden")).ratio(units_kept).max())
    cut["target"] = {"kind": target.kind, "budget": target.budget, "reached": ratio}
    if target.kind == "latency":
        whole, small = _times(before, after)
        cut["target"] |= {"measured": small / whole, "seconds": {"before": whole, "after": small}}
    return cut


def line(cut: dict[str, Any]) -> str:
    """Return a `record` for a person."""
    numbers = (" ".join(map(str, each)) if isinstance(each, list) else str(each) for each in cut["kept"].values())
    text = ", ".join(f"{kind} {each}" for kind, each in zip(cut["kept"], numbers, strict=True))
    if target := cut.get("target"):
        measured = f", measured {target['measured']:.4f}" if "measured" in target else ""
        text += f"; {target['kind']} {target['reached']:.4f}{measured} (target {target['budget']:g})"
    return f"kept {text}"


def _measured(setup: Setup) -> Latency:
    """Return the times of the widths of a run, measured once; on a mesh, on one device of the first process."""
    out, target = storage.as_path(setup.config.output_dir), setup.config.prune.target
    place, options = out / LATENCY, {"layers": target.layers, "hidden": target.hidden, **_batch(setup)}

    def measure() -> dict[str, Any]:
        about = f"{setup.model!r} {options} {jax.local_devices()[0].device_kind} {jax.__version__}"
        sha256 = hashlib.sha256(about.encode()).hexdigest()
        with storage.store_errors(place):
            begun, measured = (out / CONFIG).exists() or (out / HASHES).exists(), place.exists()
        # The times of a run stay; those of a refused one may be of another model or device.
        if measured and (begun or read_json(place).get("sha256") == sha256):
            return read_json(place)
        files.write(place, latency.measure(setup.model, **options).as_json() | {"sha256": sha256})
        return read_json(place)

    times = _of_main(measure)
    try:
        return Latency.from_json({key: value for key, value in times.items() if key in Latency._fields})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{place} is damaged: delete it, and the times are measured again") from None


def _times(before: Setup, after: Setup) -> tuple[float, float]:
    """Return the seconds of the unpruned and of the cut model; measured once."""
    place = storage.as_path(before.config.output_dir) / LATENCY

    def measure() -> list[float]:
        written, kept = read_json(place), kept_numbers(after)
        if written.get("cut", {}).get("kept") != kept:
            written["cut"] = {"kept": kept, "seconds": latency.times([before.model, after.model], **_batch(before))}
            files.write(place, written)
        return written["cut"]["seconds"]

    whole, small = _of_main(measure)
    return whole, small


def _batch(setup: Setup) -> dict[str, Any]:
    """Return the arguments of `latency.times` for a batch of training examples of the mean length."""
    length = math.ceil(float(np.mean(setup.data.train.lengths)))
    train, model = setup.config.train, setup.config.model
    return {"rows": train.batch_size, "length": length, "param_dtype": model.param_dtype}


def _of_main(measure: Callable[[], Any]) -> Any:
    """Return the result of ``measure()`` on process 0, on every process."""
    result = None
    with multihost.raise_on_all():
        if multihost.is_main():
            result = measure()
    return multihost.allgather_objects(result)[0]
