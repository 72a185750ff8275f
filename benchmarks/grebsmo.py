"""Time GreBsmo supports of all 24 query and value kernels of a BERT-base, against the procedure of the authors of DSEE.

    python -m benchmarks.grebsmo

Ours is one jitted, vmapped call with 64 entries per kernel, timed with and without compilation. The authors' procedure runs in
PyTorch and is skipped if PyTorch is not installed: 100 growth steps of 5 columns with 2 inner rounds each and a hard threshold
of 0.01, as in the paper and the description of their code. It handles one matrix after another, so the time of one matrix is
multiplied by 24. Both procedures alternate on the same random weights and cores. The result also counts how many of 64 planted
spikes ours recovers in a 768 x 768 matrix. Writes ``benchmarks/results/grebsmo.json``.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.deltas import supports
from dsee_jax.runtime import files

try:
    import torch
except ImportError:
    torch = None

KERNELS, WIDTH, NONZEROS = 24, 768, 64


def planted(seed: int) -> tuple[np.ndarray, set[int]]:
    """Return a float32 matrix and the flat indices of its 64 spikes.

    The matrix is the sum of a matrix of rank 16 with entries about 1, noise of 0.01, and the spikes of +-0.5 to 0.75.
    """
    draw = np.random.default_rng(seed)
    w = draw.normal(size=(WIDTH, 16)) @ draw.normal(size=(16, WIDTH)) / 4 + 0.01 * draw.normal(size=(WIDTH, WIDTH))
    index = draw.choice(w.size, NONZEROS, replace=False)
    w.ravel()[index] += 0.5 * draw.choice([-1, 1], NONZEROS) * draw.uniform(1, 1.5, NONZEROS)
    return w.astype(np.float32), set(index.tolist())


def authors(w, steps: int = 100, columns: int = 5, rounds: int = 2, threshold: float = 0.01):
    """Return S (torch) by greedy bilateral smoothing as the authors of DSEE run it: a hard threshold while the rank grows."""
    sparse, rest = torch.zeros_like(w), w
    right = torch.randn(columns, w.shape[1])
    for _ in range(steps):
        for _ in range(rounds):
            low = w - sparse
            left, _ = torch.linalg.qr(low @ right.T)
            right = left.T @ low
            rest = w - left @ right
            sparse = torch.where(rest.abs() > threshold, rest, 0.0)
        if len(right) + columns > min(w.shape):
            break
        # Grow along the directions of the largest residual.
        fresh = torch.linalg.qr((torch.randn(columns, w.shape[0]) @ (rest - sparse)).T)[0].T
        right = torch.cat([right, fresh])
    return sparse


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "grebsmo.json")
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    weights = (0.02 * draw.normal(size=(KERNELS, WIDTH, WIDTH))).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), KERNELS)
    select = jax.jit(jax.vmap(lambda w, key: supports.grebsmo(w, NONZEROS, key=key)))
    on_device = jnp.asarray(weights)

    def run() -> None:
        jax.block_until_ready(select(on_device, keys))

    first = seconds(run)
    ours, theirs = [], []
    for number in range(options.repeats):
        ours.append(seconds(run))
        if torch is not None:
            matrix = torch.tensor(weights[number])
            theirs.append(seconds(lambda matrix=matrix: authors(matrix)))
    spiky, truth = planted(0)
    support = supports.grebsmo(jnp.asarray(spiky), NONZEROS, key=jax.random.key(0))
    result = {
        "command": "python -m benchmarks.grebsmo",
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "device": jax.devices()[0].device_kind,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__ if torch is not None else None,
        },
        "kernels": KERNELS,
        "shape": [WIDTH, WIDTH],
        "nonzeros": NONZEROS,
        "seconds_with_compilation": first,
        "seconds": statistics.median(ours),
        "planted_found": len(truth & {row * WIDTH + column for row, column in support.tolist()}),
    }
    if torch is not None:
        one = statistics.median(theirs)
        result |= {
            "authors_seconds_one_matrix": one,
            "authors_seconds": KERNELS * one,
            "times_faster": KERNELS * one / result["seconds"],
            "times_faster_with_compilation": KERNELS * one / first,
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write(options.out, result)
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
