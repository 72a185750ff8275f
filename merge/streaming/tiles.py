"""One tensor of all models in files: the same folds and map as in memory, over tiles of bounded size.

Tiles of one size are compiled once, so the last tile of a tensor is filled up with zeros, in every model and the base: folds
see changes of zero there, and the map's results there are dropped.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from math import prod
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from dsee_jax.ckpt import tensors
from dsee_jax.errors import InputError
from merge.inputs.lazies import Lazy
from merge.leaf import Tile
from merge.select import EVERY, Cut
from merge.streaming import threshold

TILE = 1 << 20
"""Elements in a tile: large enough to hide a call's cost, small enough for a few to stay in the processor's cache."""

_SMALLEST = 1 << 14
_BLOCKS, _BLOCK = 64, 256

Sink: TypeAlias = Callable[[int, np.ndarray], None]
"""Takes the flat position of a stretch of the merged tensor, and the stretch."""


class Means(NamedTuple):
    """What the tiles of every tensor share."""

    workers: Executor
    finite: set[str]  # names of the tensors that a pass has read whole, in every model, and found finite
    allow_nonfinite: bool = False
    mine: Callable[[int], bool] = lambda number: True  # whether this process folds the leaf of that number
    gather: Callable[[list[Any]], list[Any]] = lambda found: found  # every process's folds; None: another's
    read: Callable[[int], None] = lambda nbytes: None  # told the bytes that are read


class Tiled(NamedTuple):
    """A `merge.leaf.Leaf` in files."""

    name: str
    base: Lazy | None
    models: tuple[Lazy, ...]
    statistics: tuple[Lazy, ...]
    by_rows: bool
    dtype: str  # what the merged tensor is written in
    sink: Sink
    means: Means

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.models[0].shape

    @property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """How many models there are, the base apart."""
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
        """The length of what a tile must hold whole."""
        return self.shape[-1] if self.by_rows and self.shape else 1

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
            self.sink(int(tile.start), merged.astype(tensors.DTYPES[self.dtype], copy=False))

    def fold_all(self, leaves: Sequence[Any], function: Callable[..., Any], *args: Any, **static: Any) -> list[Any]:
        """Return every leaf's fold; this process does its share of them, and all get all."""
        mine = [number for number in range(len(leaves)) if self.means.mine(number)]
        done = self.means.workers.map(lambda number: leaves[number].fold(function, *args, **static), mine)
        found: list[Any] = [None] * len(leaves)
        for number, result in zip(mine, done, strict=True):
            found[number] = result
        return self.means.gather(found)

    def select(
        self,
        leaves: Sequence[Any],
        function: Callable[..., Any],
        counts: Sequence[int],
        *args: Any,
        every_tie: bool = False,
        **static: Any,
    ) -> list[Cut]:
        """Return `merge.select.largest` over files."""
        compiled = _compiled(function, None, tuple(sorted(static.items())))

        def bits(tile: Tile, length: int) -> list[np.ndarray]:
            return [np.asarray(value).ravel()[:length].view(np.int32) for value in compiled(tile, *args)]

        def look(passes: Mapping[int, threshold.Pass], leaf: Tiled) -> dict[int, Any]:
            begun = {model: begin() for model, begin in passes.items()}
            for tile, length in leaf.tiles():
                found = bits(tile, length)
                for model, (take, _) in begun.items():
                    take(int(tile.start), found[model])
            return {model: result() for model, (_, result) in begun.items()}

        def look_all(passes: Mapping[int, threshold.Pass]) -> list[dict[int, Any]]:
            one = functools.partial(look, passes)
            # A single tensor is one worker's already: waiting for others here could wait for ever.
            return [one(leaves[0])] if len(leaves) == 1 else list(self.means.workers.map(one, leaves))

        sizes = [leaf.size for leaf in leaves]
        sampled = len(leaves) == 1 and sizes[0] > _BLOCKS * _BLOCK
        samples = bits(*leaves[0].sample()) if sampled else [None] * len(counts)
        searches = [threshold.search(sizes, count, sample) for count, sample in zip(counts, samples, strict=True)]
        found = threshold.together(searches, look_all)
        heights = np.array([one.threshold for one in found], np.float32)
        ends = np.array([one.ends for one in found], np.uint32)
        if every_tie:
            ends[:] = EVERY
        return [Cut(heights, ends[:, number]) for number in range(len(leaves))]

    def tiles(self) -> Iterator[tuple[Tile, int]]:
        """Yield the tiles, and how many elements of each are the tensor's.

        The first pass looks whether all is finite, while the tiles come into the processor's cache; the others do not touch
        what their program does not read.

        Raises:
          InputError: a NaN or an infinity, where they are not allowed; the message names the file and the tensor.
        """
        check = not self.means.allow_nonfinite and self.name not in self.means.finite
        columns = self.columns
        rows = max(self.size // columns, 1)
        # One size serves all large tensors, and a few sizes all small ones: each size is compiled once.
        held = min(max(TILE // columns, 1), 1 << (max(rows, _SMALLEST // columns, 1) - 1).bit_length())
        for start in range(0, self.size, held * columns):
            stop = min(start + held * columns, self.size)
            yield self._tile([(start, stop)], held * columns, check=check), stop - start
        if check:
            self.means.finite.add(self.name)

    def sample(self) -> tuple[Tile, int]:
        """Return a tile of short blocks from all over a tensor that is larger than that."""
        apart = self.size // _BLOCKS
        pieces = [(number * apart, number * apart + _BLOCK) for number in range(_BLOCKS)]
        return self._tile(pieces, _BLOCKS * _BLOCK, check=False), _BLOCKS * _BLOCK

    def _tile(self, pieces: list[tuple[int, int]], length: int, *, check: bool) -> Tile:
        shape = (length // self.columns, self.columns) if self.by_rows else (length,)

        def take(lazy: Lazy) -> np.ndarray:
            parts = [lazy.read(start, stop) for start, stop in pieces]
            if check and any(nonfinite(part) for part in parts):
                raise InputError(
                    f"{lazy.files[0]} holds NaN or infinity in {self.name!r}; give --allow-nonfinite to merge it all the same"
                )
            self.means.read(sum(part.nbytes for part in parts))
            held = sum(part.size for part in parts)
            if held < length:
                parts.append(np.zeros(length - held, parts[0].dtype))
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            return whole.reshape(shape)

        return Tile(
            None if self.base is None else take(self.base),
            tuple(take(model) for model in self.models),
            np.uint32(pieces[0][0] & 0xFFFFFFFF),
            tuple(take(lazy) for lazy in self.statistics),
        )


def nonfinite(array: np.ndarray) -> bool:
    """Return whether a floating-point array, contiguous, holds a NaN or an infinity."""
    # An exponent of all ones makes the largest bits, of either sign: signed numbers show it where the sign is 0, unsigned
    # ones where it is 1. Unlike isfinite these need no room, and know bfloat16.
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


@functools.cache
def _compiled(
    function: Callable[..., Any], dtype: str | None, static: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    """Return ``function`` compiled, its result in a type of safetensors."""

    def run(tile: Tile, *args: Any) -> Any:
        found = function(tile, *args, **dict(static))
        # Without x64 there is no float64 to cast to: that one is left to NumPy.
        return found if dtype in (None, "F64") else found.astype(tensors.DTYPES[dtype])

    return jax.jit(run)
