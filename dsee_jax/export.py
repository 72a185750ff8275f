"""What a run leaves: the adapter, the model in Hugging Face layout, and the figures of ``metrics.json``."""

import dataclasses
import platform
import shutil
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np

from dsee_jax import deltas as delta_trees
from dsee_jax import flops, tree
from dsee_jax import masks as mask_trees
from dsee_jax.aliases import Masks, Params
from dsee_jax.ckpt import adapter, hf
from dsee_jax.setup import Setup

ADAPTER, MODEL = "adapter", "model"


def final_params(setup: Setup, trained: dict[str, Any], masks: Masks) -> Params:
    """Return the model's own weights at the end: pruned, with the trained head; updates are not folded in."""
    params = tree.unflatten({**tree.flatten(setup.params), **tree.flatten(trained["params"])})
    return mask_trees.apply(params, masks) if masks else params


def write(setup: Setup, trained: dict[str, Any], masks: Masks, out: Path) -> dict[str, Any]:
    """Write ``adapter/`` (where there are updates) and ``model/`` below ``out``; return ``{"model_bytes": ...}``.

    ``model/`` holds the pruned weights and the tuned head; the updates stay factors, in ``adapter/`` beside it, so that the
    zeros stay zeros. Each folder is written beside its place and renamed.
    """
    config = setup.config
    final = final_params(setup, trained, masks)
    labels = setup.data.task.labels
    hf.save_pretrained(out / MODEL, setup.model, final, source=setup.folder, labels=labels, overwrite=True)
    total = _bytes(out / MODEL)
    if trained["deltas"]:
        head = tree.split(trained["params"], setup.head)[0]
        about = {
            "format": "dsee_jax adapter 1",
            "scale": config.delta.scale,
            "scale_sparse": config.delta.scale_sparse,
            "delta": dataclasses.asdict(config.delta),
            "task": config.data.task,
            "labels": list(labels),
            "base": config.model.path,
            "base_sha256": adapter.fingerprint(setup.folder),
        }
        beside = out / f"{ADAPTER}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        adapter.save(beside, adapter.Adapter(trained["deltas"], setup.supports, head, masks, about))
        shutil.rmtree(out / ADAPTER, ignore_errors=True)
        beside.rename(out / ADAPTER)
        total += (out / ADAPTER / adapter.WEIGHTS).stat().st_size
    return {"model_bytes": total}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def results(setup: Setup, trained: dict[str, Any], masks: Masks, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that depend on the seed and the input alone (`metrics.json` less times, memory and bytes).

    ``trainable_fraction`` is the trained share of the backbone (everything but the head, which ``head_parameters`` counts).
    ``flops_per_token`` counts the backbone's kernels, zeros left out, factors included; see `dsee_jax.flops`.
    """
    before, *done = stages
    final = final_params(setup, trained, masks)
    flat, head = tree.flatten(final), set(setup.head)
    backbone = {path: leaf for path, leaf in flat.items() if path not in head}
    kernels = [path for path in backbone if path.endswith("/kernel")]
    size = sum(int(np.prod(leaf.shape)) for leaf in backbone.values())
    moving = [path for path in tree.flatten(trained["params"]) if path not in head]
    count = delta_trees.count(trained["deltas"]) + sum(int(np.prod(flat[path].shape)) for path in moving)
    dense = flops.dense(final, kernels)
    used = flops.sparse(final, kernels) + flops.factors(trained["deltas"])
    device = jax.devices()[0]
    return {
        "task": setup.config.data.task,
        "seed": setup.config.train.seed,
        "before": before["metrics"],
        "stages": done,
        "final": done[-1]["metrics"],
        "trainable_parameters": count,
        "trainable_fraction": count / size,
        "head_parameters": sum(int(np.prod(flat[path].shape)) for path in setup.head),
        "backbone_parameters": size,
        "weight_sparsity": mask_trees.sparsity(final, setup.prunable),
        "flops_per_token": {"dense": 2 * dense, "final": 2 * used},
        "flops_ratio": used / dense,
        "environment": {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "device": f"{device.platform}: {device.device_kind}",
            "python": platform.python_version(),
        },
    }
