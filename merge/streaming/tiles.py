"""One tensor of all models in files: the same folds and map as in memory, over tiles of bounded size.

Each tile size is compiled once, so the last tile of a tensor is padded with zeros, in every model and the base: the changes in
the padding are zero in folds, and the results of a map in the padding are dropped.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor
from math import prod
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.ckpt import tensors
from dsee_jax.errors import InputError
from merge.inputs.lazy import Lazy
from merge.leaf import Tile
from merge.streaming import threshold
from merge.topk import EVERY, Selection

TILE = 1 << 20
"""Elements of a tile: enough to hide the cost of a call, few enough that several tiles fit the processor's cache."""

_SMALLEST = 1 << 14
_BLOCKS, _BLOCK = 64, 256

Sink: TypeAlias = Callable[[int, np.ndarray], None]
"""Takes the flat position of a chunk of the merged tensor, and the chunk."""


class Resources(NamedTuple):
    """The resources that all tensors share."""

    workers: Executor
    finite: set[str]  # names of the tensors whose elements an earlier pass found finite in every model
    stop: threading.Event  # set when the merge fails or is interrupted: no thread reads a further tile
    allow_nonfinite: bool = False
    owns: Callable[[int], bool] = lambda number: True  # whether this process folds the leaf with this number
    gather: Callable[[list[Any]], list[Any]] = lambda folds: folds  # replaces None by another process's fold
    read: Callable[[int], None] = lambda nbytes: None  # called with the bytes read

    def raise_if_stopped(self) -> None:
        """Raise `CancelledError` in a thread whose result nobody needs any more."""
        if self.stop.is_set():
            raise CancelledError


class Tiled(NamedTuple):
    """A `merge.leaf.Leaf` in files."""

    name: str
    base: Lazy | None
    models: tuple[Lazy, ...]
    statistics: tuple[Lazy, ...]
    by_rows: bool
    dtype: str  # the written type
    sink: Sink
    resources: Resources

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.models[0].shape

    @property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The number of models, without the base."""
        return len(self.models)

    @property
    def has_base(self) -> bool:
        """Whether changes are measured from a base."""
        return self.base is not None

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def columns(self) -> int:
        """The number of elements that a tile must not split: the elements of a row, or 1."""
        return max(self.shape[-1], 1) if self.by_rows and self.shape else 1

    def fold(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Return the sums over all tiles, in float64."""
        compiled, total = _compiled(function, None, tuple(sorted(static.items()))), None
        for tile, _ in self.tiles():
            part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), compiled(tile, *args))
            total = part if total is None else jax.tree.map(np.add, total, part)
        return total

    def map(self, function: Callable[..., Any], *args: Any, **static: Any) -> None:
        """Write the merged tensor into the sink."""
        compiled = _compiled(function, self.dtype, tuple(sorted(static.items())))
        for tile, length in self.tiles():
            merged = np.asarray(compiled(tile, *args)).ravel()[:length]
            if not self.resources.allow_nonfinite and nonfinite(merged):
                raise InputError(
                    f"the merged {self.name!r} holds NaN or infinity, though the inputs are finite: a value exceeds "
                    f"{_largest(self.dtype):g}, the largest of {self.dtype}, or a parameter is too large; write dtype: "
                    "float32 or bfloat16 in the recipe, or give --allow-nonfinite"
                )
            self.sink(int(tile.start), merged.astype(tensors.DTYPES[self.dtype], copy=False))

    def fold_all(self, leaves: Sequence[Any], function: Callable[..., Any], *args: Any, **static: Any) -> list[Any]:
        """Return every leaf's fold; each process folds its share of the leaves, and all processes get all folds."""
        owned = [number for number in range(len(leaves)) if self.resources.owns(number)]
        done = self.resources.workers.map(lambda number: leaves[number].fold(function, *args, **static), owned)
        folds: list[Any] = [None] * len(leaves)
        for number, result in zip(owned, done, strict=True):
            folds[number] = result
        return self.resources.gather(folds)

    def select(
        self,
        leaves: Sequence[Any],
        function: Callable[..., Any],
        counts: Sequence[int],
        *args: Any,
        every_tie: bool = False,
        **static: Any,
    ) -> list[Selection]:
        """Return the selections of `merge.topk.largest`, found in files."""
        compiled = _compiled(function, None, tuple(sorted(static.items())))

        def bits(tile: Tile, length: int) -> list[np.ndarray]:
            return [np.asarray(value).ravel()[:length].view(np.int32) for value in compiled(tile, *args)]

        def read_leaf(passes: Mapping[int, threshold.Pass], leaf: Tiled) -> dict[int, Any]:
            open_passes = {model: begin() for model, begin in passes.items()}
            for tile, length in leaf.tiles():
                chunks = bits(tile, length)
                for model, (take, _) in open_passes.items():
                    take(int(tile.start), chunks[model])
            return {model: result() for model, (_, result) in open_passes.items()}

        def read_all(passes: Mapping[int, threshold.Pass]) -> list[dict[int, Any]]:
            work = functools.partial(read_leaf, passes)
            # A single tensor already runs in a worker: submitting to the same pool could deadlock.
            return [work(leaves[0])] if len(leaves) == 1 else list(self.resources.workers.map(work, leaves))

        sizes = [leaf.size for leaf in leaves]
        sampled = len(leaves) == 1 and sizes[0] > _BLOCKS * _BLOCK
        samples = bits(*leaves[0].sample()) if sampled else [None] * len(counts)
        searches = [threshold.search(sizes, count, sample) for count, sample in zip(counts, samples, strict=True)]
        thresholds = threshold.run_all(searches, read_all)
        values = np.array([result.value for result in thresholds], np.float32)
        ends = np.array([result.ends for result in thresholds], np.uint32)
        if every_tie:
            ends[:] = EVERY
        return [Selection(values, ends[:, number]) for number in range(len(leaves))]

    def tiles(self) -> Iterator[tuple[Tile, int]]:
        """Yield the tiles, each with its number of elements without padding.

        The first pass checks that all elements are finite, while the tiles are in the processor's cache. Later passes read
        only what their program needs.

        Raises:
          InputError: a NaN or an infinity that is not allowed; the message names the file and the tensor.
        """
        check = not self.resources.allow_nonfinite and self.name not in self.resources.finite
        columns = self.columns
        rows = max(self.size // columns, 1)
        # Large tensors share one tile size, and small tensors a few sizes, since each size is compiled once.
        height = min(max(TILE // columns, 1), 1 << (max(rows, _SMALLEST // columns, 1) - 1).bit_length())
        for start in range(0, self.size, height * columns):
            self.resources.raise_if_stopped()
            stop = min(start + height * columns, self.size)
            yield self._tile([(start, stop)], height * columns, check=check), stop - start
        if check:
            self.resources.finite.add(self.name)

    def sample(self) -> tuple[Tile, int]:
        """Return a tile of short blocks spread over a tensor of more than ``_BLOCKS * _BLOCK`` elements."""
        columns, rows = self.columns, self.size // self.columns
        # Complete rows: as many as the blocks would fill, but no fewer than there are blocks while they fit in a tile.
        block = _BLOCK if columns == 1 else columns
        count = (
            _BLOCKS if columns == 1 else min(max(_BLOCKS * _BLOCK // columns, min(_BLOCKS, TILE // columns), 1), rows)
        )
        starts = [number * (rows // count) * columns for number in range(count)]
        length = count * block
        return self._tile([(start, start + block) for start in starts], length, check=False), length

    def _tile(self, pieces: list[tuple[int, int]], length: int, *, check: bool) -> Tile:
        shape = (length // self.columns, self.columns) if self.by_rows else (length,)

        def take(lazy: Lazy) -> np.ndarray:
            parts = [lazy.read(start, stop) for start, stop in pieces]
            if check and any(nonfinite(part) for part in parts):
                owners = " or ".join(map(str, dict.fromkeys(lazy.files)))  # of a model with an adapter, either
                raise InputError(
                    f"{owners} holds NaN or infinity in {self.name!r}; give --allow-nonfinite to merge it anyway"
                )
            self.resources.read(sum(part.nbytes for part in parts))
            size = sum(part.size for part in parts)
            if size < length:
                parts.append(np.zeros(length - size, parts[0].dtype))
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            return whole.reshape(shape)

        return Tile(
            None if self.base is None else take(self.base),
            tuple(take(model) for model in self.models),
            np.uint32(pieces[0][0] & 0xFFFFFFFF),
            tuple(take(lazy) for lazy in self.statistics),
        )


def nonfinite(array: np.ndarray) -> bool:
    """Return whether a contiguous floating-point array has a NaN or an infinity."""
    # NaN and infinity have the largest bits of each sign: the maximum as signed integers finds them with the sign bit 0, the
    # maximum as unsigned integers with the sign bit 1. Unlike isfinite this allocates nothing, and works for bfloat16.
    kind, infinity = {
        "float16": ("i2", 0x7C00),
        "bfloat16": ("i2", 0x7F80),
        "float32": ("i4", 0x7F800000),
        "float64": ("i8", 0x7FF0000000000000),
    }[array.dtype.name]
    signed = array.view(kind)
    unsigned = signed.view(kind.replace("i", "u"))
    negative = infinity + (1 << (8 * signed.itemsize - 1))
    return bool(array.size) and bool(signed.max() >= infinity or unsigned.max() >= negative)


def _largest(dtype: str) -> float:
    return float(jnp.finfo(jnp.float32 if dtype == "F64" else tensors.DTYPES[dtype]).max)


@functools.cache
def _compiled(
    function: Callable[..., Any], dtype: str | None, static: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    """Return ``function`` compiled, with the result in ``dtype``, a type of safetensors."""

    def run(tile: Tile, *args: Any) -> Any:
        result = function(tile, *args, **dict(static))
        # JAX has no float64 without x64: NumPy casts to F64 later.
        return result if dtype in (None, "F64") else result.astype(tensors.DTYPES[dtype])

    return jax.jit(run)
