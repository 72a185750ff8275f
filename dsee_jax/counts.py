"""Exact counts beyond an int32, for any array and under ``jax.jit``, in the 32-bit numbers that JAX has everywhere.

A count is a pair of uint32, ``256 * high + low``. The limbs are added apart, so that neither sum exceeds 32 bits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.errors import InputError
from dsee_jax.typing import Array

INT32 = 2**31
"""The entries that an int32 cannot count. A stacked kernel of a deep decoder has more."""

MOST, LONGEST = 2**40, 2**24
"""The entries that a `Count` cannot count, and the length of an axis whose low limbs may not fit a uint32."""


class Count(NamedTuple):
    """The number ``256 * high + low``."""

    high: Any  # shape=(), dtype=uint32
    low: Any  # shape=(), dtype=uint32, under 256


def of(number: int | Array) -> Count:
    """Return a number that is not negative as a count."""
    if isinstance(number, int):
        return Count(np.uint32(number >> 8), np.uint32(number & 255))
    number = jnp.asarray(number)
    return Count((number >> 8).astype(jnp.uint32), (number & 255).astype(jnp.uint32))


def true(mask: Array) -> Count:
    """Return the number of True entries of a mask."""
    return total(parts(mask))


def parts(mask: Array, most: int = INT32) -> jax.Array:
    """Return the numbers of True entries over the last axes that have fewer than ``most`` entries together, int32."""
    leading = next(axes for axes in range(mask.ndim + 1) if math.prod(mask.shape[axes:]) < most)
    return jnp.sum(mask, axis=tuple(range(leading, mask.ndim)), dtype=jnp.int32)


def check(*shapes: Sequence[int]) -> None:
    """Raise `InputError` unless a `Count` holds the entries of arrays of these shapes, all together."""
    entries = sum(math.prod(shape) for shape in shapes)
    longest = max((length for shape in shapes for length in shape), default=0)
    if entries >= MOST or (entries >= 2**32 and longest >= LONGEST):
        raise InputError(
            f"{entries} entries with an axis of {longest} are too many to count: use several smaller pools (scope='tensor')"
        )


def total(*parts: Array) -> Count:
    """Return the sum of all entries of arrays of int32 counts."""
    sums: list[Count] = []
    for part in parts:
        high, low = of(part)
        while high.ndim:
            high, low = _carried(jnp.sum(high, axis=-1, dtype=jnp.uint32), jnp.sum(low, axis=-1, dtype=jnp.uint32))
        sums.append(Count(high, low))
    return _carried(sum(each.high for each in sums), sum(each.low for each in sums))


def add(a: Count, b: Count) -> Count:
    """Return ``a + b``."""
    return _carried(a.high + b.high, a.low + b.low)


def subtract(a: Count, b: Count) -> Count:
    """Return ``a - b``, for ``a`` not below ``b``."""
    return Count(a.high - b.high - (a.low < b.low), (a.low + 256 - b.low) & 255)


def at_least(a: Count, b: Count) -> jax.Array:
    """Return whether ``a >= b``."""
    return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def where(condition: Array, a: Count, b: Count) -> Count:
    """Return ``a`` where the condition is true, else ``b``."""
    return Count(jnp.where(condition, a.high, b.high), jnp.where(condition, a.low, b.low))


def share(fraction: Array, entries: int) -> Count:
    """Return ``round(fraction * entries)``, exactly, halves to the even number as Python does.

    The fraction is a float32 in [0, 1), and a multiple of 2^-32 as every float32 from 2^-8 on is; a smaller one is rounded
    down to such a multiple.
    """
    scaled = (jnp.asarray(fraction, jnp.float32) * 2.0**32).astype(jnp.uint32)
    # Long multiplication with digits of 8 bits; the four lowest digits of the product are its fraction.
    left = [scaled >> shift & 255 for shift in (0, 8, 16, 24)]
    right = [np.uint32(entries >> shift & 255) for shift in (0, 8, 16, 24, 32)]
    carry, digits = jnp.uint32(0), []
    for place in range(8):
        products = [left[at] * right[place - at] for at in range(4) if 0 <= place - at < 5]
        carry = carry + sum(products, jnp.uint32(0)) + np.uint32(128 * (place == 3))
        digits.append(carry & 255)
        carry = carry >> 8
    # A half was rounded up: the even number is the result, or one less.
    half = (digits[0] | digits[1] | digits[2] | digits[3]) == 0
    low = jnp.where(half, digits[4] & 254, digits[4])
    return Count(digits[5] | digits[6] << 8 | digits[7] << 16 | carry << 24, low)


def number(count: Count) -> int:
    """Return a count as a Python number; not under ``jax.jit``."""
    return int(count.high) * 256 + int(count.low)


def _carried(high: Any, low: Any) -> Count:
    return Count(high + (low >> 8), low & 255)
