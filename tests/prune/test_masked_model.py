"""Masked models: a Linen model of full shape computes what the smaller model computes, with updates and without."""

import numpy as np

import dsee_jax
from cut_models import close, families, logits, whole
from dsee_jax import models, prune, tree
from dsee_jax.prune import compaction

DEPTH = {
    "layers": np.array([False, True, True]),
    "heads": {"layer_1": np.array([True, False, True])},
    "neurons": {"layer_2": np.arange(40) % 3 > 0},
}
"""The first layer of three goes; a head and some neurons of the others."""


def masked_logits(model, params, adapter, kept):
    with prune.masked(model, kept):
        return logits(model, params, adapter)


def same(family, kept):
    """Assert that the masked and the compacted model agree, with updates and without; return the small model."""
    model, params, adapter = whole(family, layers=3)
    small, small_params = dsee_jax.compact(model, params, kept)
    table = compaction.indices(model, kept, adapter.deltas, adapter.supports)
    deltas = compaction.cut_tree({"deltas": adapter.deltas}, table)["deltas"]
    cut = adapter.replace(deltas=deltas, supports=compaction.cut_supports(adapter.supports, table))
    close(logits(small, small_params), masked_logits(model, params, None, kept))
    close(logits(small, small_params, cut), masked_logits(model, params, adapter, kept))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(small_params).items()}
    assert shapes == {path: leaf.shape for path, leaf in tree.flatten(models.shapes(small)).items()}
    return small, small_params


@families("bert", "deberta", "gpt2", "qwen3")
def test_model_without_a_layer_equals_masked_model(family):
    small, _ = same(family, DEPTH)
    assert len(small.config.widths["heads"]) == 2
    assert small.config.widths["heads"] == (2, 3)


def test_masked_last_layer_passes_on_its_input():
    """The encoder's last layer computes the first position only, for a classifier."""
    same("bert", {"layers": np.array([True, False, False])})
