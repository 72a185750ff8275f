"""Side: GreBsmo supports of the kernels of a model by this library, in one jitted and vmapped call."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import child
from dsee_jax.deltas import supports

SPIKES = 64


def planted(seed: int, width: int = 768) -> tuple[np.ndarray, set[int]]:
    """Return a float32 matrix and the flat indices of its 64 spikes.

    The matrix is the sum of a matrix of rank 16 with entries about 1, noise of 0.01, and the spikes of +-0.5 to 0.75.
    """
    draw = np.random.default_rng(seed)
    w = draw.normal(size=(width, 16)) @ draw.normal(size=(16, width)) / 4 + 0.01 * draw.normal(size=(width, width))
    index = draw.choice(w.size, SPIKES, replace=False)
    w.ravel()[index] += 0.5 * draw.choice([-1, 1], SPIKES) * draw.uniform(1, 1.5, SPIKES)
    return w.astype(np.float32), set(index.tolist())


def prepare(case: dict[str, Any]) -> child.Side:
    width, kernels = case["width"], case["kernels"]
    draw = np.random.default_rng(0)
    weights = jnp.asarray((0.02 * draw.normal(size=(kernels, width, width))).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), kernels)
    select = jax.jit(jax.vmap(lambda w, key: supports.grebsmo(w, case["nonzeros"], key=key)))
    measure = child.repeated(lambda: select(weights, keys), case, finish=jax.block_until_ready)
    spiky, truth = planted(0)
    support = supports.grebsmo(jnp.asarray(spiky), SPIKES, key=jax.random.key(0))
    facts = {
        "call": f"supports of all {kernels} kernels, compiled",
        "planted_found": len(truth & {row * len(spiky) + column for row, column in support.tolist()}),
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("jax", "jaxlib"),
    }
    return child.Side(measure, facts, {})


if __name__ == "__main__":
    child.serve(prepare)
