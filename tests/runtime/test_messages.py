"""The values that processes exchange: every type survives the round trip."""

from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest

from dsee_jax.runtime import messages

VALUES = {
    "None": None,
    "nested": {"a": [1, 2.5, True, "x", b"y", None], 3: {"b": {}}},
    "tuples": (1, (), [(2,)]),
    "tuple as key": {(1, 2): "x"},
    "64 bits": 2**64 - 1,
    "more than 64 bits": [2**80, -(2**70)],
    "array": np.arange(6).reshape(2, 3),
    "transposed": np.arange(6).reshape(2, 3).T,
    "bfloat16": np.ones(3, ml_dtypes.bfloat16),
    "no elements": np.zeros((0, 3)),
    "no axes": np.array(2.0),
    "text": np.array(["ab", "c"]),
    "objects": np.array([b"x", b"yy"], object),
    "scalars": [np.float32(1.5), np.float64(0.1), np.bool_(True), np.int64(-1)],
}


def same(value, expected):
    """Assert equal values of equal types, recursively."""
    assert type(value) is type(expected)
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            same(value[key], expected[key])
    elif isinstance(expected, list | tuple):
        for one, other in zip(value, expected, strict=True):
            same(one, other)
    elif isinstance(expected, np.ndarray | np.generic):
        np.testing.assert_array_equal(value, expected, strict=True)
    else:
        assert value == expected


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_value_keeps_its_type(value):
    same(messages.unpack(messages.pack(value)), value)


def test_received_array_is_writable():
    messages.unpack(messages.pack(np.zeros(2)))[0] = 1


@pytest.mark.parametrize("value", [{1}, object(), namedtuple("Point", "x")(1)], ids=["set", "object", "NamedTuple"])
def test_unsupported_type_is_refused(value):
    with pytest.raises(TypeError, match="processes exchange no values of type"):
        messages.pack(value)
