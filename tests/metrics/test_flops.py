"""Multiply-adds per token, by hand and by the compiler."""

import jax
import numpy as np
import pytest

import decoders
import dsee_jax
import tiny
from dsee_jax import masks, models, tree
from dsee_jax.metrics import flops
from dsee_jax.prune import units

PARAMS = {
    "a": {"kernel": np.array([[1.0, 0.0, -2.0], [0.0, -0.0, 3.0]]), "bias": np.ones(3)},
    "layers": {"kernel": np.stack([np.eye(4), np.zeros((4, 4))])},
}


def test_dense_and_sparse():
    """A 2 x 3 kernel with 3 nonzeros, and a stack of two 4 x 4 kernels with 4; -0.0 is a zero; only the given paths count."""
    assert flops.dense(PARAMS, ["a/kernel"]) == 6
    assert flops.dense(PARAMS, ["a/kernel", "layers/kernel"]) == 6 + 32
    assert flops.sparse(PARAMS, ["a/kernel", "layers/kernel"]) == 3 + 4
    assert flops.dense(PARAMS, []) == 0


def test_factors():
    """r (in + out) + nnz."""
    update = {"a": np.ones((2, 2)), "b": np.ones((2, 3)), "values": np.ones(5)}
    assert flops.factors({"a": {"kernel": update}}) == 2 * (2 + 3) + 5
    assert flops.factors({}) == flops.factors(None) == 0


def bert(**changes):
    """Return two layers of the size of MiniLM without a task head, so that every position of every layer is computed."""
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 128}
    return models.find("bert").model(
        models.find("bert").config.from_hf(tiny.config(**sizes)).with_widths(**changes), "features"
    )


@pytest.mark.parametrize(
    "widths", [{}, {"heads": (8, 4), "neurons": (1000, 600)}, {"heads": (0, 12), "neurons": (1536, 0)}], ids=str
)
@pytest.mark.parametrize("length", [32, 128])
def test_multiply_adds_equal_the_count_of_xla(widths, length):
    """Dense and compacted models, within two percent of the count of one example by the compiler."""
    model = bert(**widths)
    params, ids = models.shapes(model), jax.ShapeDtypeStruct((1, length), np.int32)
    kernels = [path for path in tree.flatten(params) if path.endswith("/kernel")]
    multiply_adds = flops.example(flops.dense(params, kernels), params, models.cuts(model)["heads"], length)
    compiled = jax.jit(lambda params, ids: model.apply({"params": params}, ids)).lower(params, ids).compile()
    assert 2 * multiply_adds == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_output_matrix_counts_whether_tied_or_not(family):
    """The program is the same: every token is multiplied by the matrix that makes its logits."""
    fields = decoders.config(**decoders.VARIANTS[family] | {"vocab_size": 200})
    counts = {}
    for tied in (True, False):
        config = models.find(family).config.from_hf(fields | {"tie_word_embeddings": tied})
        model = models.find(family).model(config, "causal-lm")
        params = models.shapes(model)
        paths = flops.kernels(model, params, ())
        counts[tied] = flops.dense(params, paths)
        assert ("embeddings/word/embedding" in paths) == tied
        assert flops.dense(params, [path for path in paths if path.startswith("decoder/")]) == counts[tied] - 24 * 200
    assert counts[True] == counts[False]


def test_masked_and_compacted_models_cost_the_same():
    """With zeros skipped, the masked model needs the multiply-adds of the compacted model."""
    model = models.find("bert").model(models.find("bert").config.from_hf(tiny.config()))
    params = tiny.params(model, np.zeros((1, 1), np.int32))
    cut = units.structured(params, None, models.cuts(model), heads=0.34, neurons=0.4)
    _, small = dsee_jax.compact(model, params, cut)
    count = lambda values: [path for path in tree.flatten(values) if path.endswith("/kernel")]
    masked = masks.apply(params, cut)
    assert flops.sparse(masked, count(params)) == flops.dense(small, count(small)) < flops.dense(params, count(params))
