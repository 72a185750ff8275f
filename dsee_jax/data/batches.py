"""Batches of examples of similar length: deterministic, random access, resumable.

All arrays of a batch have ``batch_size`` rows and a length out of few (`bucket_edges`), so that few shapes are compiled.
A batch is a dict of NumPy arrays:

==================  ================  ==========================================================
``input_ids``       (rows, length)    int32
``attention_mask``  (rows, length)    int32: 1 at tokens, 0 at padding; of packed texts 1, 2, 3 ...
``token_type_ids``  (rows, length)    int32
``labels``          (rows,)           int32 classes or float32 scores
``weights``         (rows,)           float32: 1, and 0 for the rows that fill up a partial batch
==================  ================  ==========================================================

Of texts to write, ``labels`` (int32: the token that follows) and ``weights`` (1 where that is of a response) are of the shape
(rows, length). Rows that fill up repeat a real example, so that nothing computed from them is undefined.
"""

import dataclasses
import math
from collections.abc import Iterator

import grain
import numpy as np

from dsee_jax.data.tokens import Tokens
from dsee_jax.errors import InputError

Batch = dict[str, np.ndarray]


def bucket_edges(lengths: np.ndarray, *, limit: int = 16, padding: float = 0.08) -> np.ndarray:
    """Return the padded lengths to use, int64 (edges,), increasing; each example is padded to the first that holds it.

    For each number of edges the positions are the best there are, found by a dynamic programme over the histogram of
    the lengths. The number is the smallest for which less than ``padding`` of all positions is padding, at most
    ``limit``. Batches that lie across two edges add about 0.01 to that.

    Args:
      lengths: (n,) int, tokens of each example, n > 0.
      limit: the most edges, > 0.
      padding: the fraction of padding to go below.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[i, j]: positions that the sizes i..j take when they are padded to size j
    cost = np.where(np.tri(len(sizes), dtype=bool).T, sizes * (total[1:] - total[:-1, None]), np.inf)
    best, previous = cost[0], []  # best[j]: positions that the sizes 0..j take with the edges so far, the last at j
    while best[-1] * (1 - padding) >= sizes @ counts and len(previous) + 1 < min(limit, len(sizes)):
        candidates = best[:-1, None] + cost[1:]  # [i, j]: the edge before j is at i
        previous.append(candidates.argmin(0))
        best = candidates.min(0)
    chosen = [len(sizes) - 1]
    for step in reversed(previous):
        chosen.append(step[chosen[-1]])
    return sizes[chosen[::-1]].astype(np.int64)


def epoch_plan(buckets: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return which examples go together in one epoch, int64 (batches, batch_size), -1 for rows to fill up.

    The permutation of ``(seed, epoch)`` is sorted by bucket, kept as it is within each, and cut into batches, which are
    then shuffled: so a batch is a random choice out of one bucket, but for the few that lie across a boundary. Every example
    appears once; the rows to fill up stand at the end of the batch of the shortest examples.

    Args:
      buckets: (n,) int, the place of each example's padded length among the edges.
      batch_size: examples of a batch.
      seed: decides the order, together with ``epoch``.
      epoch: counted from 0.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(buckets))
    order = order[np.argsort(-buckets[order], kind="stable")]
    plan = np.full((math.ceil(len(order) / batch_size), batch_size), -1)
    plan.reshape(-1)[: len(order)] = order
    return rng.permutation(plan)


def assemble(tokens: Tokens, rows: np.ndarray, edges: np.ndarray) -> Batch:
    """Return the batch of the examples ``rows``: int (batch_size,), -1 for rows to fill up, never at the first place."""
    real = (rows >= 0).astype(np.float32)
    rows = np.where(rows >= 0, rows, rows[0])
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    positions = np.arange(int(edges[np.searchsorted(edges, lengths.max())]))
    inside = positions < lengths[:, None]
    places = np.where(inside, tokens.offsets[rows][:, None] + positions, 0)
    segments = 1 if tokens.segments is None else tokens.segments[places]
    inputs = {
        "input_ids": np.where(inside, tokens.input_ids[places], np.int32(tokens.pad_id)),
        "attention_mask": np.where(inside, segments, 0).astype(np.int32),
        "token_type_ids": np.where(inside, tokens.token_type_ids[places], np.int32(0)),
    }
    if tokens.weights is None:
        return inputs | {"labels": tokens.labels[rows], "weights": real}
    weights = np.where(inside, tokens.weights[places], np.float32(0)) * real[:, None]
    return inputs | {"labels": np.where(inside, tokens.labels[places], np.int32(0)), "weights": weights}


def count(batch: Batch) -> int:
    """Return the tokens of a batch, padding and rows that fill up left out."""
    rows = batch["weights"].reshape(len(batch["weights"]), -1).any(1)
    return int((batch["attention_mask"] != 0).sum(1) @ rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a stage of training, by step: ``batches[step]`` depends on the fields and on ``step`` alone."""

    tokens: Tokens
    batch_size: int
    epochs: float
    """May be a fraction."""
    seed: int
    edges: np.ndarray
    """The padded lengths, from `bucket_edges`."""
    _plans: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every example once."""
        return math.ceil(self.tokens.size / self.batch_size)

    def __len__(self) -> int:
        # 1e-9: 0.1 epochs of 30 steps are 3 steps, though 0.1 * 30 is a little more than 3
        return math.ceil(self.epochs * self.steps_per_epoch - 1e-9)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        epoch, place = divmod(index, self.steps_per_epoch)
        plan = self._plans.get(epoch)
        if plan is None:
            buckets = np.searchsorted(self.edges, self.tokens.lengths)
            plan = epoch_plan(buckets, self.batch_size, seed=self.seed, epoch=epoch)
            self._plans.clear()
            self._plans[epoch] = plan
        return assemble(self.tokens, plan[place], self.edges)


def iterate(batches: Batches, *, start: int = 0, prefetch: int = 8) -> grain.DatasetIterator:
    """Return a grain iterator over ``batches`` from step ``start`` on; a thread keeps ``prefetch`` of them ready.

    ``get_state()`` is a small dict of ints to put in a checkpoint; ``set_state`` of an iterator over equal batches goes
    on behind the last batch that was taken, wherever in an epoch that was.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    iterator.set_state({**iterator.get_state(), "next_index": start})
    return iterator


def eval_batches(tokens: Tokens, batch_size: int, edges: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield batches, longest examples first, that hold every example once, each with the indices of its examples.

    The indices are int64 (r,), r <= batch_size: row ``i`` of the batch is example ``indices[i]``, and rows from ``r`` on
    fill up (weight 0).
    """
    order = np.argsort(-tokens.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield assemble(tokens, np.pad(indices, (0, batch_size - len(indices)), constant_values=-1), edges), indices


def micro_batches(rows: int, length: int, batch_tokens: int) -> int:
    """Return into how many equal parts to cut a batch (rows, length) so that a part has ``batch_tokens`` positions at most.

    The number divides ``rows`` and is the smallest that does; 0 ``batch_tokens`` means no limit. Raises `InputError` if even
    one row is too long.
    """
    if not batch_tokens:
        return 1
    if length > batch_tokens:
        raise InputError(f"data.batch_tokens: {batch_tokens} is less than one example of {length} tokens; raise it")
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts * length <= batch_tokens)
