"""Named arrays in safetensors files, single or sharded: headers first, then one array at a time.

`read` reads an array by plain file reads: the pages of a memory map would count as used memory until the end. `mapped` reads
a part of an array through a memory map.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialized

from dsee_jax.ckpt import first_bytes, formats
from dsee_jax.ckpt.folders import INDEX, SINGLE
from dsee_jax.errors import InputError
from dsee_jax.typing import Array

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""The supported types of safetensors, by their names in a header."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Those of the params of a model; arrays of other types are buffers, or weights that are quantised."""

_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}

_LARGEST = 32 << 20
"""The most bytes of JSON that are parsed: enough for some 300,000 tensors, and few enough for any memory."""

_AXES, _ENTRIES = 64, 1 << 59
"""The most axes, and entries, of an array in NumPy."""

MAPS = 256
"""The most files that are mapped into memory at once; each counts as an open file."""


_PART = 1 << 20
"""The entries of an array that are compared or checked at a time."""

_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00}
"""The bits of the exponent: all are set in an infinity and in NaN, and in no other number."""


class Stored(NamedTuple):
    """The location of one array on disk."""

    file: Path
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


def index(folder: Path) -> dict[str, Stored]:
    """Return ``{name: where}`` of ``model.safetensors``, or of all shards of its index, from their headers alone.

    Raises:
      InputError: no safetensors (the line says what the folder holds, see `dsee_jax.ckpt.formats`), a file that is truncated
        or not safetensors, a missing shard, or an index that disagrees with its shards.
    """
    if (folder / SINGLE).exists():
        return contents(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise InputError(formats.describe(folder))
    placed = _placed(folder / INDEX)
    stored: dict[str, Stored] = {}
    for file in sorted(set(placed.values())):
        if not (folder / file).exists():
            raise InputError(f"{folder / file} is missing; {INDEX} lists it: download or copy it again")
        stored |= contents(folder / file)
    for name, file in placed.items():
        if name not in stored or stored[name].file.name != file:
            raise InputError(f"{folder / INDEX} puts {name!r} in {file!r}, which does not hold it: download both again")
    return stored


def _placed(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_bytes())["weight_map"] if path.stat().st_size <= _LARGEST else {}
        # A shard must be in the folder of its index; other paths would read files elsewhere on the disk.
        good = all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_ .+=-]{0,200}\.safetensors", file) for file in placed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good, placed = False, {}
    if not good or not placed:
        raise InputError(
            f"{path} is not an index of shards: expected JSON with 'weight_map': {{name: file.safetensors}}"
        )
    return placed


def contents(file: Path) -> dict[str, Stored]:
    """Return ``{name: where}`` of one safetensors file, from its header; raises `InputError` as `index` does."""
    try:
        if not file.is_file():
            raise OSError("no such file" if not file.exists() else "not a file")
        with file.open("rb") as opened:
            begin = opened.read(first_bytes.LENGTH)
        size, kind = int.from_bytes(begin[:8], "little"), first_bytes.describe(begin)
        if kind and begin[8:9] != b"{":  # the header is JSON, and its length may be any byte
            raise InputError(f"{file} is {kind}")
        if size > min(_LARGEST, file.stat().st_size):
            raise ValueError(f"its header claims {size} bytes")
        # safe_open checks the lengths and the order of all arrays without reading them.
        with safe_open(file, framework="numpy") as checked:
            names = set(checked.keys())
        with file.open("rb") as opened:
            opened.seek(8)
            header = json.loads(opened.read(size))
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = ascii(" ".join(str(error).split())[:200])[1:-1]
        raise InputError(f"{file} is not a complete safetensors file ({reason}): download or copy it again") from None
    stored = {}
    for name in sorted(names):
        (start, end), shape = header[name]["data_offsets"], tuple(header[name]["shape"])
        # An empty array may claim any size of its other axes.
        if len(shape) > _AXES or math.prod(max(length, 1) for length in shape) > _ENTRIES:
            raise InputError(f"{file}: {name[:200]!r} has the shape {str(list(shape))[:200]}, which no array can have")
        stored[name] = Stored(file, header[name]["dtype"], shape, 8 + size + start, end - start)
    return stored


def read(stored: Stored) -> np.ndarray:
    """Return a copy of one array, in the type of the file.

    Raises:
      InputError: a type that is not in `DTYPES`, or a file that has become shorter.
    """
    dtype = _dtype(stored)
    flat = np.fromfile(stored.file, dtype, stored.nbytes // dtype.itemsize, offset=stored.offset)
    if flat.nbytes != stored.nbytes:
        raise InputError(f"{stored.file} ends early: the file has changed since it was opened")
    return flat.reshape(stored.shape)


def equal(a: Stored, b: Stored) -> bool:
    """Return whether two arrays have equal shapes and values; reads `_PART` entries of each at a time, up to a difference.

    Arrays of one type are compared bit by bit, others by their values.
    """
    if a.shape != b.shape:
        return False
    kinds, count = (_dtype(a), _dtype(b)), math.prod(a.shape)
    for start in range(0, count, _PART):
        size = min(_PART, count - start)
        one, other = (
            np.fromfile(stored.file, kind, size, offset=stored.offset + start * kind.itemsize)
            for stored, kind in zip((a, b), kinds, strict=True)
        )
        if not (one.tobytes() == other.tobytes() if kinds[0] == kinds[1] else np.array_equal(one, other)):
            return False
    return True


def finite(array: np.ndarray) -> bool:
    """Return whether an array holds neither NaN nor infinities, without a second array of its size."""
    flat = array.reshape(-1)
    exponent = _EXPONENTS.get(array.dtype.name)
    if exponent is None:
        return all(np.isfinite(flat[start : start + _PART]).all() for start in range(0, flat.size, _PART))
    # The loops of NumPy for these types are several times slower than those for integers.
    bits = flat.view(np.uint16)
    parts = (bits[start : start + _PART] & np.uint16(0x7FFF) for start in range(0, bits.size, _PART))
    return all(part.max() < exponent for part in parts)


def mapped(stored: Stored, start: int, stop: int) -> np.ndarray:
    """Return the flat elements [start, stop) of one array, read-only, through a memory map of its file.

    Raises:
      InputError: a type that is not in `DTYPES`, or a file that has become shorter.
    """
    dtype, content = _dtype(stored), every_byte(stored.file)
    offset = stored.offset + start * dtype.itemsize
    end = stored.offset + stop * dtype.itemsize
    if end > content.size:
        raise InputError(f"{stored.file} ends early: the file has changed since it was opened")
    return content[offset:end].view(dtype)


def every_byte(file: Path) -> np.ndarray:
    """Return all bytes of a file, (size,) uint8, read-only, through one shared memory map per file.

    Raises:
      OSError: the file cannot be read.
    """
    stat = file.stat()
    return _map(file, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=MAPS)
def _map(file: Path, inode: int, size: int, changed: int) -> np.ndarray:
    """Return the map of a file; the numbers distinguish the file from a later one at the same path."""
    return np.memmap(file, np.uint8, "r").view(np.ndarray) if size else np.empty(0, np.uint8)


def _dtype(stored: Stored) -> np.dtype[Any]:
    if stored.dtype not in DTYPES:
        raise InputError(
            f"{stored.file} stores {stored.dtype}, which is not supported; expected one of {', '.join(DTYPES)}"
        )
    return np.dtype(DTYPES[stored.dtype])


def byte_size(text: str | int) -> int:
    """Return the bytes of ``"5GB"``, ``"500 MB"`` (powers of 1000, as Hugging Face counts) or of a number.

    Raises:
      InputError: the text is no size, or less than one byte.
    """
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?)B?", str(text).strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise InputError(f"{text!r} is not a size; expected a number of bytes, or a text like '500MB' or '5GB'")
    return size


def shards(sizes: Mapping[str, int], *, max_shard_size: str | int = "5GB") -> dict[str, list[str]]:
    """Return ``{file: names}`` for arrays of these bytes: ``model.safetensors``, or shards in order, none above the limit.

    An array above the limit gets a shard of its own.
    """
    limit = byte_size(max_shard_size)
    parts: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if parts[-1] and used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{number + 1:05}-of-{len(parts):05}.safetensors": names for number, names in enumerate(parts)}


def header(arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """Return the header of a file of arrays ``{name: (type, shape)}``, the offset of each array, and the size of the file.

    Types are keys of `DTYPES`. The arrays follow the header in their order, from a multiple of 64 bytes.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, (dtype, shape) in arrays.items():
        offsets[name], end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    begin = len(text).to_bytes(8, "little") + text
    return begin, {name: len(begin) + offset for name, offset in offsets.items()}, len(begin) + end


def index_text(files: Mapping[str, Sequence[str]], nbytes: int) -> str:
    """Return the content of `INDEX` for shards ``{file: names}`` with ``nbytes`` bytes of arrays."""
    placed = {name: file for file, names in files.items() for name in names}
    return json.dumps({"metadata": {"total_size": nbytes}, "weight_map": placed}, indent=2, sort_keys=True) + "\n"


def save(file: Path, arrays: Mapping[str, Array], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file of any arrays, by the library's own serializer; `write` is for large models."""
    file.write_bytes(serialized({name: _contiguous(array) for name, array in arrays.items()}, metadata))


def _contiguous(array: Array) -> np.ndarray:
    """Return an array in row-major memory: safetensors writes the memory of a strided view as it lies, in the wrong order."""
    return np.ascontiguousarray(array)


def write(
    folder: Path, arrays: Mapping[str, Array], *, max_shard_size: str | int = "5GB", indexed: bool = False
) -> None:
    """Write ``model.safetensors``, or shards and their index if the arrays are larger than ``max_shard_size``.

    Arrays may have any strides, such as transposed views. ``indexed`` writes the index of a single file as well.
    """
    kinds = {name: (_NAMES[np.dtype(array.dtype)], array.shape) for name, array in arrays.items()}
    write_each(folder, kinds, arrays.__getitem__, max_shard_size=max_shard_size, indexed=indexed)


def write_each(
    folder: Path,
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
    array: Callable[[str], Array],
    *,
    max_shard_size: str | int = "5GB",
    indexed: bool = False,
) -> None:
    """Write what `write` writes from arrays ``{name: (type, shape)}``; ``array(name)`` is called when its turn comes."""
    sizes = {name: math.prod(shape) * np.dtype(DTYPES[kind]).itemsize for name, (kind, shape) in kinds.items()}
    files = shards(sizes, max_shard_size=max_shard_size)
    for file, names in files.items():
        begin, _, _ = header({name: kinds[name] for name in names})
        with (folder / file).open("wb") as opened:
            opened.write(begin)
            for name in names:
                opened.write(_contiguous(array(name)).reshape(-1).view(np.uint8).data)
    if indexed or len(files) > 1:
        (folder / INDEX).write_text(index_text(files, sum(sizes.values())))
