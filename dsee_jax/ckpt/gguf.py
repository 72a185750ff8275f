"""Read GGUF files, versions 2 and 3: metadata, and tensors as floating-point numbers.

A tensor of a quantised type is a row of blocks. A block holds 32 or 256 integers of a few bits, and the scales that turn them
into numbers. Types, layouts and formulas are those of ggml: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from dsee_jax.errors import InputError, shorten

SUFFIX = ".gguf"

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
"""Codes of metadata values that are numbers."""
_TEXT, _ARRAY = 8, 9
_NAME, _AXES = 256, 4
"""The most bytes of a name, and axes of a tensor; ggml has 64 and 4."""
_PART = 1 << 20
"""The numbers that are read and dequantised at a time."""


class Kind(NamedTuple):
    """A type of tensors."""

    name: str
    entries: int
    """The numbers in a block."""
    nbytes: int
    """The bytes of a block."""
    numbers: Callable[[np.ndarray], np.ndarray]
    """Blocks, (blocks, nbytes) uint8 -> (blocks, entries) float32 or, of types that are not quantised, the type itself."""


class Tensor(NamedTuple):
    """The location of one tensor in a file."""

    kind: Kind
    shape: tuple[int, ...]  # as in NumPy: the last axis is contiguous
    offset: int  # bytes from the start of the file


class Gguf(NamedTuple):
    """The header of a file."""

    file: Path
    metadata: Mapping[str, Any]  # numbers, texts, bools, and lists of these
    tensors: Mapping[str, Tensor]


def _plain(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: blocks.view(dtype)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """Return the float16 at byte ``start`` of every block, float32 (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Return integers of 4 bits, (..., 2 * bytes): the low halves of all bytes, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """Return the upper bits of 32 integers of 5 bits, which lie in four bytes, as 16 or 0: (blocks, 32)."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << 4


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    integers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (integers.astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)) + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _in_parts(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _in_parts(blocks, low | high << 4)


def _in_parts(blocks: np.ndarray, integers: np.ndarray) -> np.ndarray:
    """Return the numbers of integers (blocks, 8, 32); each of the eight parts has a scale and a minimum of 6 bits."""
    low, high, rest = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    scaled = (_half(blocks, 0) * scales)[..., None] * integers - (_half(blocks, 2) * minima)[..., None]
    return scaled.reshape(-1, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Sixteen parts of 16 integers of 6 bits, each with a scale of 8 bits; the upper two bits of an integer lie apart."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    integers = (low | high.reshape(-1, 2, 128) << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return (scales[..., None] * integers).reshape(-1, 256)


KINDS = {
    0: Kind("F32", 1, 4, _plain("<f4")),
    1: Kind("F16", 1, 2, _plain("<f2")),
    2: Kind("Q4_0", 32, 18, _q4_0),
    3: Kind("Q4_1", 32, 20, _q4_1),
    6: Kind("Q5_0", 32, 22, _q5_0),
    7: Kind("Q5_1", 32, 24, _q5_1),
    8: Kind("Q8_0", 32, 34, _q8_0),
    12: Kind("Q4_K", 256, 144, _q4_k),
    13: Kind("Q5_K", 256, 176, _q5_k),
    14: Kind("Q6_K", 256, 210, _q6_k),
    30: Kind("BF16", 1, 2, _plain(ml_dtypes.bfloat16)),
}
"""The supported types by ggml's codes."""

_OTHERS = {
    **{9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS"},
    **{
        18: "IQ3_XXS",
        19: "IQ1_S",
        20: "IQ4_NL",
        21: "IQ3_S",
        22: "IQ2_S",
        23: "IQ4_XS",
        24: "I8",
        25: "I16",
        26: "I32",
    },
    **{27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
"""The names of other types, for messages."""


class _Header:
    """The bytes of a header, read in their order."""

    def __init__(self, path: Path, opened: BinaryIO) -> None:
        self.path, self.opened, self.size = path, opened, os.fstat(opened.fileno()).st_size

    def take(self, count: int) -> bytes:
        if count > self.size or len(content := self.opened.read(count)) < count:
            raise InputError(f"{self.path} ends inside its header: the file is truncated or damaged: download it again")
        return content

    def number(self, code: int) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: int, count: int) -> list[Any]:
        dtype = np.dtype(_NUMBERS[code])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def text(self, most: int = 1 << 30) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        if length > most:
            raise InputError(f"{self.path}: a name in its header has {length} bytes: the file is damaged")
        return self.take(length).decode("utf-8", "replace")

    def value(self, key: str) -> Any:
        code = self.number(4)
        if code == _TEXT:
            return self.text()
        if code in _NUMBERS:
            return self.number(code)
        if code == _ARRAY:
            inner, count = self.number(4), self.number(10)
            if inner in _NUMBERS:
                return self.numbers(inner, count)
            if inner == _TEXT and count <= self.size:
                return [self.text() for _ in range(count)]
        raise InputError(
            f"{self.path}: the value of {key!r} has an unknown type ({code}): the file is damaged, or newer"
        )


def read_header(path: Path) -> Gguf:
    """Return the header of a file.

    Raises:
      InputError: not a GGUF file of version 2 or 3 in little-endian order, a part of a split file, a truncated header or
        tensor, or a tensor of a type that is not in `KINDS`.
    """
    with path.open("rb") as opened:
        header = _Header(path, opened)
        if header.size < 24 or header.take(4) != _MAGIC:
            raise InputError(
                f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()!r}; download it again"
            )
        _check_version(path, header.take(4))
        tensors, keys = header.numbers(10, 2)
        metadata = {key: header.value(key) for _ in _counted(header, keys) for key in (header.text(_NAME),)}
        if (parts := metadata.get("split.count", 1)) not in (0, 1):
            raise InputError(
                f"{path} is one of {parts} parts of a split GGUF, which are not read apart: join them by "
                "gguf-split --merge FIRST_PART OUT.gguf, a tool beside the converter"
            )
        infos = [_info(header) for _ in _counted(header, tensors)]
        start = opened.tell()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise InputError(f"{path}: 'general.alignment' is {shorten(repr(alignment))}; expected a number of bytes")
    start += -start % alignment
    stored: dict[str, Tensor] = {}
    for name, kind, shape, offset in infos:
        if name in stored:
            raise InputError(f"{path} holds the tensor {name!r} twice: the file is damaged")
        stored[name] = tensor = Tensor(kind, shape, start + offset)
        if (end := tensor.offset + _blocks(tensor) * kind.nbytes) > header.size:
            raise InputError(
                f"{path}: the tensor {name!r} ends at byte {end}, the file at {header.size}: the file is truncated: "
                "download it again"
            )
    return Gguf(path, metadata, stored)


def _check_version(path: Path, content: bytes) -> None:
    (version,), (swapped,) = struct.unpack("<I", content), struct.unpack(">I", content)
    if version not in _VERSIONS:
        big = "is in big-endian order, for another processor" if swapped in _VERSIONS else f"has version {version}"
        raise InputError(
            f"{path} {big}; expected little-endian GGUF of version 2 or 3: convert the model again by a present converter"
        )


def _counted(header: _Header, count: int) -> range:
    """Return a loop over ``count`` entries; each takes 12 bytes or more, which bounds the memory of a damaged file."""
    if 12 * count > header.size:
        raise InputError(f"{header.path}: its header claims {count} entries: the file is truncated or damaged")
    return range(count)


def _info(header: _Header) -> tuple[str, Kind, tuple[int, ...], int]:
    """Return name, type, shape and offset of the next tensor."""
    name, axes = header.text(_NAME), header.number(4)
    shape = tuple(header.numbers(10, min(axes, _AXES + 1))[::-1])
    code, offset = header.number(4), header.number(10)
    if axes > _AXES or math.prod(max(length, 1) for length in shape) > 1 << 59:
        raise InputError(f"{header.path}: the tensor {name!r} has {axes} axes or too many entries: the file is damaged")
    if code not in KINDS:
        kind = _OTHERS.get(code, f"number {code}")
        supported = ", ".join(each.name for each in KINDS.values())
        raise InputError(
            f"{header.path}: the tensor {name!r} has the type {kind}, which is not supported; supported: {supported}"
        )
    kind = KINDS[code]
    if shape and shape[-1] % kind.entries:
        raise InputError(
            f"{header.path}: the tensor {name!r} has rows of {shape[-1]} entries, {kind.name} has blocks of {kind.entries}: "
            "the file is damaged"
        )
    return name, kind, shape, offset


def _blocks(tensor: Tensor) -> int:
    return math.prod(tensor.shape) // tensor.kind.entries


def read(gguf: Gguf, name: str) -> np.ndarray:
    """Return one tensor: float32, or float16 and bfloat16 as stored; quantised ones take little memory beside the result.

    Raises:
      InputError: the file has become shorter.
    """
    tensor = gguf.tensors[name]
    kind, blocks = tensor.kind, _blocks(tensor)
    dtype = kind.numbers(np.zeros((0, kind.nbytes), np.uint8)).dtype
    array = np.empty((blocks, kind.entries), dtype)
    part = _PART // kind.entries
    with gguf.file.open("rb") as opened:
        opened.seek(tensor.offset)
        for start in range(0, blocks, part):
            count = min(part, blocks - start)
            content = np.fromfile(opened, np.uint8, count * kind.nbytes)
            if content.size < count * kind.nbytes:
                raise InputError(f"{gguf.file} ends early: the file has changed since it was opened")
            array[start : start + count] = kind.numbers(content.reshape(count, kind.nbytes))
    return array.reshape(tensor.shape)
