"""The results of a run: the adapter, the model in Hugging Face layout, and the figures of ``metrics.json``."""

import dataclasses
import platform
from typing import Any

import flax
import jax
import numpy as np

from dsee_jax import models, stacks, tree
from dsee_jax.ckpt import adapter, hf_save, kept_units
from dsee_jax.ckpt.folders import ADAPTER, ADAPTER_FILES, ADAPTER_WEIGHTS, MODEL
from dsee_jax.data import HELD, Task
from dsee_jax.deltas.adapter import count
from dsee_jax.masks import apply as apply_masks
from dsee_jax.metrics import flops
from dsee_jax.models.architecture import scans
from dsee_jax.prune import compaction
from dsee_jax.runtime import files, multihost, storage
from dsee_jax.runtime.storage import Place
from dsee_jax.train import hashes, run_card
from dsee_jax.train.setup import Setup, changes_kernels
from dsee_jax.typing import Masks, Params

_HELD = f"loss_{HELD}"
"""The metric whose rise is the forgetting."""


def trained_head(setup: Setup) -> list[str]:
    """Return the paths of the head that a run trains."""
    moving = tree.flatten(setup.trained["params"])
    return [path for path in setup.head if path in moving]


def kept_numbers(setup: Setup) -> dict[str, Any]:
    """Return the numbers of heads and neurons in every layer, and those of the units of the whole model that a run cut."""
    numbers: dict[str, Any] = {kind: list(widths) for kind, widths in setup.model.config.widths.items()}
    return numbers | {kind: int(flags.sum()) for kind, flags in setup.kept.items() if kind not in numbers}


def final_params(setup: Setup, trained: dict[str, Any], masks: Masks) -> Params:
    """Return the final weights of the model: pruned, with the trained head; updates are not folded in."""
    params = tree.unflatten({**tree.flatten(setup.params), **tree.flatten(trained["params"])})
    return apply_masks(params, masks) if masks else params


def to_host_layers(
    setup: Setup, final: Setup, trained: dict[str, Any], masks: Masks
) -> tuple[Setup, Setup, dict[str, Any], Masks]:
    """Return the arguments of `results` and `write` on the host, with one subtree per layer, as in files."""
    if multihost.is_distributed():
        final = final._replace(params=multihost.to_host(final.params), supports=multihost.to_host(final.supports))
        trained, masks = multihost.to_host((trained, masks))
    if not scans(setup.model):
        return setup, final, trained, masks

    def layers(values: Any) -> dict[str, Any]:
        return stacks.unstack(multihost.to_host(values))

    params = layers(final.params)
    # A scanned model is never structurally pruned: final shapes are initial shapes.
    setup = final._replace(
        model=setup.model.clone(scan=False),
        params=params,
        prunable=[path for path in tree.flatten(params) if stacks.place(path)[0] in setup.prunable],
        trained={part: layers(values) for part, values in setup.trained.items()},
        supports=layers(final.supports),
    )
    return setup, setup, {part: layers(values) for part, values in trained.items()}, layers(masks)


def write(setup: Setup, trained: dict[str, Any], masks: Masks, out: Place, figures: dict[str, Any]) -> dict[str, Any]:
    """Write ``model/`` with its hashes and, where the run has updates, ``adapter/``; return ``{"model_bytes": ...}``.

    ``model/`` has the pruned weights and the tuned head; after structured pruning it is a compact checkpoint. The updates are
    separate factors in ``adapter/``, so that zeros of the weights stay zeros. ``figures``, from `results`, are those of the
    model card.
    """
    config = setup.config
    final = final_params(setup, trained, masks)
    task = setup.data.task
    labels = task.labels
    kept = compaction.composed(kept_units.read(setup.folder), setup.kept)
    hf_save.save_pretrained(
        out / MODEL,
        setup.model,
        final,
        source=setup.folder,
        labels=labels,
        problem_type=task.problem_type,
        kept=kept,
        card=run_card.render(config, figures, name=out.name, classes=task.num_labels, form="model"),
        overwrite=True,
    )
    hashes.write(out, {"model": hashes.of_model(out / MODEL)})
    total = _bytes(out / MODEL)
    if config.delta.rank or config.delta.nonzeros:
        written = hashes.read(out)
        about = {
            "format": "dsee_jax adapter 1",
            "scale": config.delta.scale,
            "scale_sparse": config.delta.scale_sparse,
            "delta": dataclasses.asdict(config.delta),
            "task": task.name,
            "labels": list(labels),
            "base": config.model.path,
            adapter.BASE_SHA256: written["base"][hashes.WEIGHTS],
            adapter.MODEL_SHA256: written["model"][hashes.WEIGHTS],
        } | ({"kept": kept_numbers(setup)} if setup.kept else {})
        if changes_kernels(setup):  # the weights that stay changed: the updates fit ``model/`` alone
            about["base"] = str(out / MODEL)
            del about[adapter.BASE_SHA256]
        with files.folder(out / ADAPTER, replaces=ADAPTER_FILES) as staging:
            adapter.save(
                staging, adapter.Saved(trained["deltas"], setup.supports, trained["params"], masks, about, kept)
            )
        total += storage.size(out / ADAPTER / ADAPTER_WEIGHTS)
    return {"model_bytes": total}


def _bytes(folder: Place) -> int:
    return sum(storage.size(path) for path in folder.glob("*.safetensors"))


def _sizes(task: Task) -> dict[str, dict[str, int]]:
    """Return the examples of both halves of each dev set."""
    return {name: {"choose": len(task.dev[name][0]), "score": len(half[0])} for name, half in task.scoring.items()}


def results(
    setup: Setup, final: Setup, trained: dict[str, Any], masks: Masks, stages: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the figures of ``metrics.json`` that depend on seed and input only: all but times, memory and bytes.

    ``setup`` is the setup at the start of the run, ``final`` at its end; they differ after structured pruning.

    Scores: ``final`` are those of the best evaluation on the dev set in the last stage, which the same dev set chooses;
    ``final_last`` those of the last evaluation. Each stage that trains has the number of its ``evaluations``, the
    ``best_step`` and the metrics of the ``last``. With ``data.split_dev``, ``before``, ``metrics`` of a stage and ``final``
    are of the test half, ``choose``, ``last`` and ``final_last`` of the validation half; ``dev_examples`` are the
    examples of both. ``forgetting`` is the rise, in nats per token, of the loss on ``data.held_text`` from before the run to
    ``final``.

    Parameters are counted at the start. ``head_parameters`` are those of the head that the run trains, and the backbone all
    others. ``trainable_parameters`` and ``trainable_fraction`` are of the backbone; ``trainable_fraction_with_head`` is the
    fraction of all parameters that the run trains. ``parameters_ratio`` is the final backbone, without removed units and with
    zeros and updates, over the backbone at the start. ``weight_sparsity`` is the fraction of zero and removed weights in the
    prunable kernels.

    FLOPs: those of `flops.kernels` without their zeros, and of the factors of updates. ``flops_per_token`` leaves out all that
    depends on the length; ``flops_per_example`` adds attention, for an example of ``data.max_length`` tokens.
    """
    before, *done = stages
    params = final_params(final, trained, masks)
    flat, head = tree.flatten(setup.params), set(trained_head(setup))
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flat.items()}
    heads_size = sum(sizes[path] for path in head)
    backbone = sum(sizes.values()) - heads_size
    moving = [path for path in tree.flatten(setup.trained["params"]) if path not in head]
    trained_count = count(setup.trained["deltas"]) + sum(sizes[path] for path in moving)
    kernels = flops.kernels(setup.model, setup.params, set(setup.head))
    dense = flops.dense(setup.params, kernels)
    left = set(tree.flatten(params))
    used = flops.sparse(params, (path for path in kernels if path in left)) + flops.factors(trained["deltas"])
    stored = sum(int(np.prod(leaf.shape)) for path, leaf in tree.flatten(params).items() if path not in head)
    remaining = stored + count(trained["deltas"])
    prunable, length = flops.dense(setup.params, setup.prunable), setup.config.data.max_length
    heads = models.cuts(setup.model).get("heads", ())
    device, scores = jax.devices()[0], done[-1]["metrics"]
    split = {"choose": done[-1]["choose"], "dev_examples": _sizes(setup.data.task)} if "choose" in done[-1] else {}
    rise = {"forgetting": scores[_HELD] - before["metrics"][_HELD]} if _HELD in scores else {}
    return {
        "task": setup.data.task.name,
        "seed": setup.config.train.seed,
        "before": before["metrics"],
        "stages": done,
        "final": scores,
        "final_last": done[-1].get("last", done[-1]["metrics"]),
        **split,
        **rise,
        "rank": setup.config.delta.rank,
        "trainable_parameters": trained_count,
        "trainable_fraction": trained_count / backbone,
        "trainable_fraction_with_head": (trained_count + heads_size) / (backbone + heads_size),
        "head_parameters": heads_size,
        "backbone_parameters": backbone,
        "parameters_ratio": remaining / backbone,
        "weight_sparsity": 1 - flops.sparse(params, final.prunable) / prunable if prunable else 0.0,
        "kept": kept_numbers(final),
        "flops_per_token": {"dense": 2 * dense, "final": 2 * used},
        "flops_per_example": {
            "length": length,
            "dense": 2 * flops.example(dense, setup.params, heads, length),
            "final": 2 * flops.example(used, params, heads, length),
        },
        "flops_ratio": used / dense,
        "flops_counted": flops.COUNTED,
        "environment": {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "device": f"{device.platform}: {device.device_kind}",
            "python": platform.python_version(),
        },
    }
