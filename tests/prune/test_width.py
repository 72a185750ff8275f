"""Coefficients of hidden dimensions: those of 0 and 1 compute the model without some of them."""

import numpy as np
import pytest

from cut_models import close, families, logits, whole
from dsee_jax import models, prune
from dsee_jax.errors import InputError
from dsee_jax.prune import width

KEPT = np.arange(24) % 3 > 0


@pytest.mark.sampled(2)
@families("bert", "gpt2", "llama")
def test_coefficients_of_zero_compute_the_model_without_the_dimensions(family):
    model, params, _ = whole(family)
    stay = KEPT if model.task == "features" else slice(None)
    with prune.masked(model, {"hidden": KEPT}):
        expected = logits(model, params)[..., stay]
    with width.weighted(KEPT.astype(np.float32), models.hidden_axes(model)):
        close(logits(model, params)[..., stay], expected)
    plain = logits(model, params)[..., stay]
    with width.weighted(np.ones(24, np.float32), models.hidden_axes(model)):
        close(logits(model, params)[..., stay], plain)
    assert not np.allclose(plain, expected, atol=1e-3)


def test_block_without_a_call_is_refused():
    model, *_ = whole("bert")
    message, axes = "reached no 'classifier/kernel", models.hidden_axes(model)
    with pytest.raises(InputError, match=message), width.weighted(np.ones(24), axes):
        pass
