"""Batches of examples of similar length: deterministic, with random access by step, resumable.

Every array of a batch has ``batch_size`` rows and one of a few lengths (`bucket_edges`), so that few shapes are compiled.
A batch is a dict of NumPy arrays:

==================  ================  ==========================================================
``input_ids``       (rows, length)    int32
``attention_mask``  (rows, length)    int32: 1 = token, 0 = padding; in packed rows the text's number, 1, 2, 3 ...
``token_type_ids``  (rows, length)    int32
``labels``          (rows,)           int32 classes or float32 scores; multi-label: (rows, classes) float32, 0 or 1
                    or (rows, 2)      int32: the first and last token of an answer
``weights``         (rows,)           float32: 1 = example, 0 = filler row of a partial batch
==================  ================  ==========================================================

For causal-lm ``labels`` (int32: the next token) and ``weights`` (1 where the next token belongs to a response) have the shape
(rows, length); those of tagged words too (the tag, and 1 at the first token of a word). A filler row repeats a real example,
so that every value computed from it is finite. With a teacher a batch has its outputs too (`tokens.TeacherOutputs`), of rows
or of tokens; those at padding are of any token.
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
    """Return the padded lengths, int64 (edges,), increasing; an example is padded to the first edge that is long enough.

    For a given number of edges the edges are optimal: a dynamic program over the histogram of lengths finds those with the
    least padding. The number of edges is the smallest, up to ``limit``, for which less than ``padding`` of all positions is
    padding. Batches with examples of two buckets add about 0.01 to that fraction.

    Args:
      lengths: (n,) int, tokens of each example, n > 0.
      limit: the largest number of edges, > 0.
      padding: the fraction of padding to stay below.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[i, j]: positions of the examples of sizes i..j, padded to size j
    cost = np.where(np.tri(len(sizes), dtype=bool).T, sizes * (total[1:] - total[:-1, None]), np.inf)
    best, previous = cost[0], []  # best[j]: positions of sizes 0..j with the last edge at j
    while best[-1] * (1 - padding) >= sizes @ counts and len(previous) + 1 < min(limit, len(sizes)):
        candidates = best[:-1, None] + cost[1:]  # [i, j]: the previous edge is at i, the last at j
        previous.append(candidates.argmin(0))
        best = candidates.min(0)
    chosen = [len(sizes) - 1]
    for step in reversed(previous):
        chosen.append(step[chosen[-1]])
    return sizes[chosen[::-1]].astype(np.int64)


def epoch_batches(buckets: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the example indices of every batch of one epoch, int64 (batches, batch_size); -1 = filler row.

    The permutation of ``(seed, epoch)`` is sorted stably by bucket and divided into batches, which are then shuffled. So
    a batch is a random sample of one bucket, except for the few batches across a bucket boundary. Every example appears
    once. The filler rows are at the end of the batch with the shortest examples.

    Args:
      buckets: (n,) int, index of each example's padded length among the edges.
      batch_size: examples per batch.
      seed: decides the order, together with ``epoch``.
      epoch: counted from 0.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(buckets))
    order = order[np.argsort(-buckets[order], kind="stable")]
    rows = np.full((math.ceil(len(order) / batch_size), batch_size), -1)
    rows.reshape(-1)[: len(order)] = order
    return rng.permutation(rows)


def assemble(tokens: Tokens, rows: np.ndarray, edges: np.ndarray) -> Batch:
    """Return the batch of the examples ``rows``: int (batch_size,), -1 = filler row; the first row is never a filler."""
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
    if tokens.teacher is not None:
        at = tokens.teacher.rows[places if tokens.teacher.by_token else rows]
        inputs |= {name: array[at] for name, array in tokens.teacher.arrays.items()}
    if tokens.weights is None:
        return inputs | {"labels": tokens.labels[rows], "weights": real}
    weights = np.where(inside, tokens.weights[places], np.float32(0)) * real[:, None]
    return inputs | {"labels": np.where(inside, tokens.labels[places], np.int32(0)), "weights": weights}


def whole_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return the number of steps of ``epochs`` passes over the examples, which may be a fraction: rounded up."""
    # In floating point 0.1 * 30 is slightly more than 3; 0.1 epochs of 30 steps are 3 steps.
    return math.ceil(epochs * steps_per_epoch - 1e-9)


def real_rows(batch: Batch) -> np.ndarray:
    """Return the rows of a batch with a weight that is not 0, bool (rows,): no filler rows."""
    return (batch["weights"].reshape(len(batch["weights"]), -1) != 0).any(axis=1)


def count_tokens(batch: Batch) -> int:
    """Return the number of tokens in a batch, without padding and filler rows."""
    return int((batch["attention_mask"] != 0).sum(1) @ real_rows(batch))


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a training stage: ``batches[step]`` depends on the fields and on ``step`` alone."""

    tokens: Tokens
    batch_size: int
    epochs: float
    """Passes over the examples; may be a fraction."""
    seed: int
    edges: np.ndarray
    """The padded lengths, from `bucket_edges`."""
    first: int = 0
    """Steps of the earlier stages. The order of the data goes on after them."""
    _epoch: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)
    """The `epoch_batches` of the latest epoch that was read."""

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches that contain every example once."""
        return math.ceil(self.tokens.size / self.batch_size)

    def __len__(self) -> int:
        return whole_steps(self.epochs, self.steps_per_epoch)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        return assemble(self.tokens, self._rows(index), self.edges)

    def examples(self) -> np.ndarray:
        """Return the indices of the examples in the batches, int64 (n,), increasing and each once."""
        # Twice as many steps as an epoch has contain a whole epoch.
        rows = [self._rows(index) for index in range(min(len(self), 2 * self.steps_per_epoch))]
        visited = np.unique(np.array(rows, np.int64))
        return visited[visited >= 0]

    def _rows(self, index: int) -> np.ndarray:
        """Return the examples of a batch, int64 (batch_size,); -1 = filler row."""
        epoch, position = divmod(self.first + index, self.steps_per_epoch)
        rows = self._epoch.get(epoch)
        if rows is None:
            buckets = np.searchsorted(self.edges, self.tokens.lengths)
            rows = epoch_batches(buckets, self.batch_size, seed=self.seed, epoch=epoch)
            self._epoch.clear()
            self._epoch[epoch] = rows
        return rows[position]


def iterate(batches: Batches, *, start: int = 0, prefetch: int = 8) -> grain.DatasetIterator:
    """Return a grain iterator over ``batches`` that starts at step ``start``; a thread prefetches ``prefetch`` batches.

    ``get_state()`` returns a small dict of ints for a checkpoint. After ``set_state`` an iterator over equal batches resumes
    at the next batch, also in the middle of an epoch.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    iterator.set_state({**iterator.get_state(), "next_index": start})
    return iterator


def eval_batches(
    tokens: Tokens, batch_size: int, edges: np.ndarray, examples: np.ndarray | None = None
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield ``(batch, indices)``, longest examples first; every example, or each of ``examples`` (n,), is in one batch.

    The indices are int64 (r,), r <= batch_size: row ``i`` of the batch is example ``indices[i]``; the rows from ``r`` on are
    filler rows (weight 0).
    """
    examples = np.arange(tokens.size) if examples is None else examples
    order = examples[np.argsort(-tokens.lengths[examples], kind="stable")]
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield assemble(tokens, np.pad(indices, (0, batch_size - len(indices)), constant_values=-1), edges), indices


def micro_batches(rows: int, length: int, batch_tokens: int) -> int:
    """Return the number of equal micro-batches of a batch (rows, length), each of at most ``batch_tokens`` positions.

    The number is the smallest divisor of ``rows`` that satisfies the limit; 1 where ``batch_tokens`` is 0 (no limit). Raises
    `InputError` if a single row exceeds the limit.
    """
    if not batch_tokens:
        return 1
    if length > batch_tokens:
        raise InputError(f"data.batch_tokens: {batch_tokens} is less than one example of {length} tokens; raise it")
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts * length <= batch_tokens)
