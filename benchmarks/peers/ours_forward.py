"""Side: logits of a batch by this library: the model, the model cut to half of its units, or its StableHLO program."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dsee_jax
from benchmarks.peers import child, inputs, shapes
from dsee_jax import models, tree
from dsee_jax.export import run_template, stablehlo
from dsee_jax.metrics import flops
from dsee_jax.models import INPUTS


def prepare(case: dict[str, Any]) -> child.Side:
    model: Any
    model, params = dsee_jax.load_pretrained(case["model"], shapes.task(case["shape"]), num_labels=2)
    if case["form"] == "cut":
        cuts = models.cuts(model)
        kept = dsee_jax.prune.structured(params, None, cuts, heads=0.5, neurons=0.5, score="W", scope="tensor")
        model, params = dsee_jax.compact(model, params, kept)
    run = _exported(model, params, case["model"]) if case["form"] == "stablehlo" else _jitted(model, params)
    ids = inputs.ids(case, model.config.vocab_size).astype(np.int32)
    batch = (ids, np.ones_like(ids), np.zeros_like(ids))
    logits = np.asarray(run(*batch), np.float64)[: inputs.CHECKED].tolist()
    head = tree.select(models.find(model.config.model_type).head, tree.flatten(params))
    per_token = flops.dense(params, flops.kernels(model, params, head))
    facts = {
        "call": "from token ids on the host to logits on the host",
        "flops": 2 * case["batch"] * flops.example(per_token, params, models.cuts(model)["heads"], case["length"]),
        "device": jax.devices()[0].device_kind,
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("jax", "jaxlib", "flax"),
    }
    check = {} if case["form"] == "cut" else {"logits": logits}
    return child.Side(child.repeated(lambda: np.asarray(run(*batch)), case), facts, check)


def _jitted(model: Any, params: Any) -> Callable[..., jax.Array]:
    run = jax.jit(lambda params, *batch: model.apply({"params": params}, **dict(zip(INPUTS, batch, strict=True))))
    return lambda *batch: run(params, *batch)


def _exported(model: Any, params: Any, source: str) -> Callable[..., jax.Array]:
    """Return the program of an export, loaded as by its run.py."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        stablehlo.write(out, model, params, source=Path(source))
        return run_template.load(out)


if __name__ == "__main__":
    child.serve(prepare)
