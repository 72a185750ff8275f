"""Masks in safetensors files, one bit per entry."""

import json
import os
import pathlib

import numpy as np
import safetensors

from dsee_jax import tree
from dsee_jax.ckpt import tensors
from dsee_jax.errors import InputError
from dsee_jax.runtime import atomic
from dsee_jax.typing import Array, Masks

_FORMAT = "dsee_jax.masks.1"


def pack(mask: Array) -> np.ndarray:
    """Return the bits of a mask as uint8 (ceil(size / 8),), in row-major order, the highest bit of a byte first."""
    return np.packbits(np.asarray(mask, bool).ravel())


def unpack(packed: Array, shape: tuple[int, ...]) -> np.ndarray:
    """Return the bool mask of ``shape`` from the bytes (ceil(size / 8),) of `pack`.

    Raises:
      InputError: the number of bytes is wrong for ``shape``.
    """
    size = int(np.prod(shape))
    if packed.shape != (-(-size // 8),):
        raise InputError(f"a mask of shape {shape} takes {-(-size // 8)} bytes, found the shape {packed.shape}")
    return np.unpackbits(np.asarray(packed, np.uint8), count=size).astype(bool).reshape(shape)


def save(path: str | os.PathLike[str], masks: Masks) -> None:
    """Write masks to a safetensors file, completely or not at all (`dsee_jax.runtime.atomic`)."""
    flat = tree.flatten(masks)
    shapes = json.dumps({name: list(mask.shape) for name, mask in flat.items()})
    packed = {name: pack(mask) for name, mask in flat.items()}
    with atomic.file(pathlib.Path(path)) as partial:
        tensors.save(partial, packed, metadata={"format": _FORMAT, "shapes": shapes})


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the masks of a file from `save`.

    Raises:
      InputError: the file is missing, damaged, or holds no masks.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read the masks {os.fspath(path)!r}: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{os.fspath(path)!r} is a safetensors file but not one of masks ({_FORMAT})")
    try:
        shapes = {name: tuple(map(int, shape)) for name, shape in json.loads(metadata["shapes"]).items()}
        return tree.unflatten({name: unpack(packed[name], shape) for name, shape in shapes.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{os.fspath(path)!r}: damaged masks: {error}") from None
