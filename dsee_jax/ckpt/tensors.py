"""Named arrays in safetensors files, single or sharded: headers first, then one array at a time.

Arrays are read with plain file reads, not through a memory map, whose pages would count as used memory until the end.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dsee_jax.aliases import Array
from dsee_jax.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

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
"""The types of safetensors that are read, by their names in a header."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file({k: v.clone().contiguous() for k, v in '
    "torch.load('%s', map_location='cpu', weights_only=True).items()}, 'model.safetensors')\""
)


class Stored(NamedTuple):
    """Where one array lies on disk."""

    file: Path
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


def index(folder: Path) -> dict[str, Stored]:
    """Return ``{name: where}`` of ``model.safetensors``, or of all shards of its index, from their headers alone.

    Raises:
      InputError: no safetensors (a pickle is refused with the way out), a file that is truncated or not safetensors, a
        shard that is missing, or an index that does not agree with its shards.
    """
    if (folder / SINGLE).exists():
        return _header(folder / SINGLE)
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder / pickles[0]} is a pickle, which can run code when opened, and is not read; expected {SINGLE}: "
                f"where torch is installed, run there: {_CONVERT % pickles[0]}"
            )
        raise InputError(f"{folder} holds no weights: expected {SINGLE} or {INDEX}")
    placed = _placed(folder / INDEX)
    stored: dict[str, Stored] = {}
    for file in sorted(set(placed.values())):
        if not (folder / file).exists():
            raise InputError(f"{folder / file} is missing; {INDEX} lists it: download or copy it again")
        stored |= _header(folder / file)
    for name, file in placed.items():
        if name not in stored or stored[name].file.name != file:
            raise InputError(f"{folder / INDEX} puts {name!r} in {file!r}, which does not hold it: download both again")
    return stored


def _placed(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_bytes())["weight_map"]
        # A shard stands beside its index; anything else would read files elsewhere on the disk.
        good = all(Path(file).name == file and file.endswith(".safetensors") for file in placed.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        good, placed = False, {}
    if not good or not placed:
        raise InputError(
            f"{path} is not an index of shards: expected JSON with 'weight_map': {{name: file.safetensors}}"
        )
    return placed


def _header(file: Path) -> dict[str, Stored]:
    try:
        # Checks the lengths and the order of everything; maps the file, and touches none of its arrays.
        with safe_open(file, framework="numpy") as checked:
            names = set(checked.keys())
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({error}): download or copy it again") from None
    stored = {}
    for name in sorted(names):
        start, end = header[name]["data_offsets"]
        stored[name] = Stored(file, header[name]["dtype"], tuple(header[name]["shape"]), 8 + size + start, end - start)
    return stored


def read(stored: Stored) -> np.ndarray:
    """Return one array, its own copy, in the type of the file.

    Raises:
      InputError: a type that is not in `DTYPES`, or a file that has become shorter.
    """
    if stored.dtype not in DTYPES:
        raise InputError(f"{stored.file} stores {stored.dtype}, which is not read; expected one of {', '.join(DTYPES)}")
    dtype = np.dtype(DTYPES[stored.dtype])
    flat = np.fromfile(stored.file, dtype, stored.nbytes // dtype.itemsize, offset=stored.offset)
    if flat.nbytes != stored.nbytes:
        raise InputError(f"{stored.file} ends early: it has changed since it was opened")
    return flat.reshape(stored.shape)


def byte_size(text: str | int) -> int:
    """Return the bytes of ``"5GB"``, ``"500 MB"`` (powers of 1000, as Hugging Face counts) or of a number.

    Raises:
      InputError: anything else, or less than one byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(text).strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise InputError(f"{text!r} is not a size; expected a number of bytes, or one like '500MB' or '5GB'")
    return size


def write(folder: Path, arrays: Mapping[str, Array], *, max_shard_size: str | int = "5GB") -> None:
    """Write ``model.safetensors``, or shards and their index when the arrays are larger than ``max_shard_size``.

    An array larger than that gets a shard of its own. Any strides will do: a transposed view is written as what it shows.
    """
    limit = byte_size(max_shard_size)
    shards: list[list[str]] = [[]]
    used = 0
    for name, array in arrays.items():
        if shards[-1] and used + array.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += array.nbytes
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    for file, names in zip(files, shards, strict=True):
        # safetensors 0.8.0 writes the memory behind a view, not the view: every array must be contiguous in C order.
        part = {name: np.ascontiguousarray(arrays[name]) for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if count > 1:
        total = sum(int(array.nbytes) for array in arrays.values())
        placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text + "\n")
