"""Side: the procedure of the authors of DSEE for the sparse part of a kernel, in PyTorch.

100 growth steps of 5 columns with 2 inner rounds each and a hard threshold of 0.01, as in the paper and the description of
their code. It handles one matrix after another, so the seconds of one matrix are multiplied by the number of kernels.
"""

import os
from typing import Any

import numpy as np
import torch

from benchmarks.peers import child, inputs


def sparse_part(
    w: torch.Tensor, steps: int = 100, columns: int = 5, rounds: int = 2, threshold: float = 0.01
) -> torch.Tensor:
    """Return S by greedy bilateral smoothing as the authors of DSEE run it: a hard threshold while the rank grows."""
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


def prepare(case: dict[str, Any]) -> child.Side:
    torch.set_num_threads(int(os.environ["PEERS_THREADS"]))
    torch.manual_seed(0)
    width, kernels = case["width"], case["kernels"]
    draw = np.random.default_rng(0)
    matrix = torch.tensor((0.02 * draw.normal(size=(width, width))).astype(np.float32))
    measure = child.repeated(lambda: sparse_part(matrix), case)

    def all_kernels(number: int) -> dict[str, float]:
        figures = measure(number)
        return {**figures, "seconds": kernels * figures["seconds"]}

    spiky, truth = inputs.planted(0)
    largest = sparse_part(torch.from_numpy(spiky)).abs().flatten().topk(inputs.SPIKES).indices
    facts = {
        "planted_found": len(truth & set(largest.tolist())),
        "call": f"the seconds of one kernel, times {kernels}",
        "threads": str(torch.get_num_threads()),
        "versions": child.versions("torch"),
    }
    return child.Side(all_kernels, facts, {})


if __name__ == "__main__":
    child.serve(prepare)
