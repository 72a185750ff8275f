"""The bytes that the processes of a job exchange: plain values and arrays, by msgpack."""

from typing import Any

import msgpack
import numpy as np

_TUPLE, _INTEGER, _ARRAY, _SCALAR = range(4)
"""The extension types of msgpack messages, for values that msgpack itself lacks or would change."""


def pack(value: Any) -> bytes:
    """Return a value as bytes, from which `unpack` restores it with its types.

    Values are None, bool, int of any size, float, str, bytes, list, tuple, dict, NumPy arrays and NumPy scalars, nested in
    any way; an array has less than 4 GiB.

    Raises:
      TypeError: any other type, such as a NamedTuple.
    """
    packer = msgpack.Packer(default=_extension, strict_types=True)
    return packer.pack(value)


def unpack(data: bytes) -> Any:
    """Return the value that `pack` turned into ``data``."""
    return msgpack.unpackb(data, ext_hook=_value, strict_map_key=False)


def _extension(value: Any) -> msgpack.ExtType:
    if type(value) is tuple:
        return msgpack.ExtType(_TUPLE, pack(list(value)))
    if type(value) is int:  # beyond 64 bits
        return msgpack.ExtType(_INTEGER, str(value).encode())
    if isinstance(value, np.ndarray | np.generic):
        dtype = value.dtype
        # The type strings of bfloat16 and the like say no more than their size.
        name = dtype.str if np.dtype(dtype.str) == dtype else dtype.name
        content = value.ravel().tolist() if dtype.hasobject else value.tobytes()
        kind = _ARRAY if isinstance(value, np.ndarray) else _SCALAR
        return msgpack.ExtType(kind, pack([name, list(value.shape), content]))
    raise TypeError(f"processes exchange no values of type {type(value).__name__}")


def _value(kind: int, data: bytes) -> Any:
    if kind == _INTEGER:
        return int(data)
    if kind == _TUPLE:
        return tuple(unpack(data))
    name, shape, content = unpack(data)
    dtype = np.dtype(name)
    if dtype.hasobject:
        array = np.empty(len(content), dtype)
        array[:] = content
    else:
        array = np.frombuffer(bytearray(content), dtype)  # of a bytearray, so that the array may be written to
    return array.reshape(shape)[()] if kind == _SCALAR else array.reshape(shape)
