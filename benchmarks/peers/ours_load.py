"""Side: loading a checkpoint by this library: seconds, and the peak memory of the process above its state before."""

import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers import child, shapes
from dsee_jax import load_pretrained


def prepare(case: dict[str, Any]) -> child.Side:
    for file in Path(case["model"]).glob("*.safetensors"):
        child.read_through(file)
    jax.block_until_ready(jnp.arange(8) + 1)
    before, begin = child.peak(), time.perf_counter()
    _, params = load_pretrained(case["model"], shapes.task(case["shape"]), param_dtype=case["dtype"])
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begin
    raised, weights = child.peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    facts = {
        "weights_bytes": weights,
        "raised_over_weights": raised / weights,
        "state": "JAX and the function are imported, and JAX has run a program; the file is in the page cache",
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("jax", "jaxlib", "flax"),
    }
    return child.Side(child.once({"seconds": seconds, "raised_bytes": raised}), facts, {"bytes": weights})


if __name__ == "__main__":
    child.serve(prepare)
