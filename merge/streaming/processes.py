"""The JAX processes of one job, which share a merge."""

import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def mine(number: int) -> bool:
    """Return whether the piece of work of that number is this process's."""
    return number % jax.process_count() == jax.process_index()


def together(what: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather(found: list[Any]) -> list[Any]:
    """Return the results of all processes from each one's share, in which None stands for another's."""
    if jax.process_count() == 1:
        return found
    # As bytes: through JAX, float64 would come back as float32.
    told = np.frombuffer(pickle.dumps(found), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(told.size))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: told.size] = told
    every = multihost_utils.process_allgather(padded)
    shares = [pickle.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]
    return [shares[number % len(shares)][number] for number in range(len(found))]
