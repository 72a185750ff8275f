"""Multiply-adds a token, by hand."""

import numpy as np

from dsee_jax import flops

PARAMS = {
    "a": {"kernel": np.array([[1.0, 0.0, -2.0], [0.0, -0.0, 3.0]]), "bias": np.ones(3)},
    "layers": {"kernel": np.stack([np.eye(4), np.zeros((4, 4))])},
}


def test_dense_and_sparse():
    """A 2 x 3 kernel with 3 nonzeros, and a stack of two 4 x 4 with 4; a -0.0 is a zero; only what is named counts."""
    assert flops.dense(PARAMS, ["a/kernel"]) == 6
    assert flops.dense(PARAMS, ["a/kernel", "layers/kernel"]) == 6 + 32
    assert flops.sparse(PARAMS, ["a/kernel", "layers/kernel"]) == 3 + 4
    assert flops.dense(PARAMS, []) == 0


def test_factors():
    """r (in + out) + nnz."""
    update = {"a": np.ones((2, 2)), "b": np.ones((2, 3)), "values": np.ones(5)}
    assert flops.factors({"a": {"kernel": update}}) == 2 * (2 + 3) + 5
    assert flops.factors({}) == flops.factors(None) == 0
