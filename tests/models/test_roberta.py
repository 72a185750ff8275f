"""The differences of RoBERTa from BERT."""

import numpy as np
import pytest

import tiny
from dsee_jax import models
from dsee_jax.errors import InputError
from dsee_jax.models import roberta, xlm_roberta


def test_positions_skip_padding():
    """Tokens count from pad_token_id + 1, wherever the padding is; padding has the position pad_token_id."""
    config = roberta.Config.from_hf(tiny.config("roberta", pad_token_id=1))
    ids = np.array([[5, 6, 7, 1], [1, 1, 5, 6], [5, 1, 6, 1]])
    expected = [[2, 3, 4, 1], [1, 1, 2, 3], [2, 1, 3, 1]]
    assert roberta.positions(ids, config.pad_token_id).tolist() == expected


@pytest.mark.parametrize("pad", [None, -1, 31, 1.0])
def test_padding_id_without_positions_is_refused(pad):
    with pytest.raises(InputError, match=rf"'pad_token_id' is {pad}; expected a whole number from 0 to 30"):
        roberta.Config.from_hf(tiny.config("roberta", pad_token_id=pad))


def test_xlm_roberta_keeps_its_model_type():
    """Also after with_dropout; the class name follows."""
    config = xlm_roberta.Config.from_hf(tiny.config("xlm-roberta"))
    assert (config.model_type, config.with_dropout(0.0).model_type) == ("xlm-roberta", "xlm-roberta")
    assert models.class_name(xlm_roberta.ARCHITECTURE.model(config, "features")) == "XLMRobertaModel"
