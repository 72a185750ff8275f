"""Side: GreBsmo supports of the kernels of a model by this library, in one jitted and vmapped call."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import child, inputs
from dsee_jax.deltas import supports


def prepare(case: dict[str, Any]) -> child.Side:
    width, kernels = case["width"], case["kernels"]
    draw = np.random.default_rng(0)
    weights = jnp.asarray((0.02 * draw.normal(size=(kernels, width, width))).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), kernels)
    select = jax.jit(jax.vmap(lambda w, key: supports.grebsmo(w, case["nonzeros"], key=key)))
    measure = child.repeated(lambda: select(weights, keys), case, finish=jax.block_until_ready)
    spiky, truth = inputs.planted(0)
    support = supports.grebsmo(jnp.asarray(spiky), inputs.SPIKES, key=jax.random.key(0))
    facts = {
        "call": f"supports of all {kernels} kernels, compiled",
        "planted_found": len(truth & {row * len(spiky) + column for row, column in support.tolist()}),
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("jax", "jaxlib"),
    }
    return child.Side(measure, facts, {})


if __name__ == "__main__":
    child.serve(prepare)
