"""Pruning in a run: its schedule, its masks, and the setup and frozen params of the steps after it."""

import re
from collections.abc import Container, Mapping
from typing import Any

from dsee_jax import tree
from dsee_jax.config import PruneConfig
from dsee_jax.masks import apply as apply_masks
from dsee_jax.prune import compaction, weights
from dsee_jax.train import calibrated, cutting, sharding
from dsee_jax.train.setup import Setup, changes_kernels, keys
from dsee_jax.train.step import Frozen
from dsee_jax.typing import Masks

AUTO_SPARSITY, AUTO_STEPS = 0.5, 500
"""``prune.schedule: auto`` prunes little by little from this sparsity and number of steps of re-tuning on."""

DRAWS = {"cubic": 10, "interleaved": 4}
"""The draws of the mask by schedule, where ``prune.schedule_updates`` is 0."""


def schedule(config: PruneConfig, total: int) -> str:
    """Return the schedule of a re-tuning of ``total`` steps, where ``auto`` is resolved by its rule."""
    if config.schedule != "auto":
        return config.schedule
    # SparseGPT changes the weights once.
    again = config.kind == "unstructured" and config.score != "SPARSEGPT"
    return "cubic" if again and config.sparsity >= AUTO_SPARSITY and total >= AUTO_STEPS else "one_shot"


def sparsities(config: PruneConfig, total: int) -> dict[int, float]:
    """Return ``{step of retune: sparsity}`` for a re-tuning of ``total`` steps; step 0 is the stage prune.

    The last entry has the full ``sparsity``. one_shot, or a run without re-tuning, has one entry. cubic: the last is at
    ``schedule_fraction`` of the steps; where several updates have one step, the last counts. interleaved: entries are at the
    starts of equal rounds, one step long or longer. Each prunes an equal share of the weights that are left, so that after
    round k of n a share ``(1 - sparsity) ** (k / n)`` is left.
    """
    name = schedule(config, total)
    if name == "one_shot" or not total:
        return {0: config.sparsity}
    count = config.schedule_updates or DRAWS[name]
    if name == "interleaved":
        count = min(count, total)
        left = [(1 - config.sparsity) ** (number / count) for number in range(1, count)]
        at = [round(total * number / count) for number in range(count)]
        return dict(zip(at, [*(1 - share for share in left), config.sparsity], strict=True))
    last = round(config.schedule_fraction * (total - 1))
    at = [round(last * number / max(count - 1, 1)) for number in range(count)]
    grown = weights.cubic(config.sparsity, steps=count)
    return {step: float(grown(number + 1)) for number, step in enumerate(at)}


def rounds(config: PruneConfig, total: int) -> list[int]:
    """Return the steps of a re-tuning at which the learning rate begins to rise; the first is 0."""
    return [*sparsities(config, total)] if schedule(config, total) == "interleaved" else [0]


def draw(setup: Setup, trained: dict[str, Any], masks: Masks, sparsity: float) -> Masks:
    """Return the masks (True = kept) of the config's pruning for the current weights and updates; ``masks`` only shrink.

    Structured pruning returns the kept units (`dsee_jax.prune.units`).
    """
    pruning = setup.config.prune
    if pruning.kind == "structured":
        return cutting.choose(setup, trained)
    if pruning.calibrate == "layerwise":
        new, _ = calibrated.layerwise(setup, trained, masks, sparsity)
        return sharding.place(setup.placed, {"masks": new})["masks"]
    params, updates = calibrated.current(setup, trained)
    common: dict[str, Any] = {"score": pruning.score, "key": keys(setup.config.train.seed)["prune"]}
    common |= calibrated.evidence(setup, trained, masks)
    # Targets may overlap, and rules may not.
    rules = list(map(re.escape, setup.prunable))
    if pruning.kind == "nm":
        new = weights.nm(params, updates, rules, n=pruning.n, m=pruning.m, **common)
    else:
        options = {"sparsity": sparsity, "scope": pruning.scope, "keep": masks or None}
        new = weights.unstructured(params, updates, rules, **options, **common)
    return sharding.place(setup.placed, {"masks": new})["masks"]


def reconstruct(setup: Setup, trained: dict[str, Any]) -> tuple[Setup, dict[str, Any], Masks]:
    """Return setup, trained values and masks after a pruning that changes the weights that stay, ``SPARSEGPT``.

    The changed kernels are in the params of the setup, and those that the run trains in the trained values.
    """
    masks, params = calibrated.layerwise(setup, trained, {}, setup.config.prune.sparsity)
    new = sharding.place(setup.placed, {"masks": masks, "params": params})
    flat = tree.flatten(new["params"])
    moving = {path: flat[path].astype(leaf.dtype) for path, leaf in tree.flatten(trained["params"]).items()}
    changed = {path: flat[path] for path in tree.flatten(masks) if path not in moving}
    return with_kernels(setup, changed), trained | {"params": tree.unflatten(moving)}, new["masks"]


def with_kernels(setup: Setup, kernels: Mapping[str, Any]) -> Setup:
    """Return the setup with other frozen kernels, by path."""
    return setup._replace(params=tree.replace(setup.params, kernels))


def apply_cut(setup: Setup, trained: dict[str, Any], masks: Masks) -> tuple[Setup, dict[str, Any], Masks]:
    """Return the setup, the trained values and the remaining masks after the pruning that ``masks`` describe.

    Structured pruning removes units from all arrays; no masks remain. Any other pruning sets the pruned trained
    weights to 0 and keeps ``masks``.
    """
    if setup.config.prune.kind != "structured":
        return setup, mask_trained(trained, masks), masks
    indices = compaction.indices(setup.model, masks, trained["deltas"], setup.supports)
    return resize(setup, masks), compaction.cut_tree(trained, indices), {}


def resize(setup: Setup, kept: Masks) -> Setup:
    """Return the setup of the smaller model with the units ``kept``: model, params, supports and initial trained values."""
    indices = compaction.indices(setup.model, kept, setup.trained["deltas"], setup.supports)
    params = compaction.cut_tree({"params": setup.params}, indices)["params"]
    model = compaction.resized(setup.model, kept)
    return setup._replace(
        model=model,
        params=params,
        prunable=compaction.moved(setup.prunable, indices, params),
        trained=compaction.cut_tree(setup.trained, indices),
        supports=compaction.cut_supports(setup.supports, indices),
        placed=sharding.placement(setup.placed.mesh, model, cut=True),
        kept=kept,
    )


def freeze(setup: Setup, masks: Masks) -> Frozen:
    """Return the `Frozen` input of a step: the masked params that are not trained, and the masks of those that are."""
    moving = tree.flatten(setup.trained["params"])
    # SPARSEGPT has set the pruned entries to 0 already. A second masking would copy the kernels.
    flat = tree.flatten(setup.params if changes_kernels(setup) else apply_masks(setup.params, masks))
    rest = tree.unflatten({path: leaf for path, leaf in flat.items() if path not in moving})
    return Frozen(rest, setup.supports, _within(masks, moving))


def mask_trained(trained: dict[str, Any], masks: Masks) -> dict[str, Any]:
    """Return ``trained`` with its pruned weights set to 0 (full fine-tuning; updates are not masked)."""
    return trained | {"params": apply_masks(trained["params"], _within(masks, tree.flatten(trained["params"])))}


def _within(masks: Masks, paths: Container[str]) -> dict[str, Any]:
    return tree.unflatten({path: mask for path, mask in tree.flatten(masks).items() if path in paths})
