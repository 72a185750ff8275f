"""What RoBERTa does otherwise than BERT."""

import numpy as np
import pytest

import tiny
from dsee_jax.errors import InputError
from dsee_jax.models import roberta, xlm_roberta


def test_positions_skip_padding():
    """Tokens count from the one after the padding's id, wherever padding stands; padding itself has that id."""
    config = roberta.Config.from_hf(tiny.config("roberta", pad_token_id=1))
    ids = np.array([[5, 6, 7, 1], [1, 1, 5, 6], [5, 1, 6, 1]])
    expected = [[2, 3, 4, 1], [1, 1, 2, 3], [2, 1, 3, 1]]
    assert roberta.positions(config, ids).tolist() == expected


@pytest.mark.parametrize("pad", [None, -1, 31, 1.0])
def test_a_padding_that_leaves_no_position_is_refused(pad):
    with pytest.raises(InputError, match=rf"'pad_token_id' is {pad}; expected a whole number from 0 to 30"):
        roberta.Config.from_hf(tiny.config("roberta", pad_token_id=pad))


def test_the_other_name():
    """A config read as XLM-RoBERTa stays one."""
    config = xlm_roberta.Config.from_hf(tiny.config("xlm-roberta"))
    assert (config.model_type, config.with_dropout(0.0).model_type) == ("xlm-roberta", "xlm-roberta")
    assert xlm_roberta.ARCHITECTURES["features"] == "XLMRobertaModel"
