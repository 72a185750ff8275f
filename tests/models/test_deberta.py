"""Disentangled attention against the formula of the paper, and its config fields."""

import jax
import numpy as np
import pytest

import tiny
from dsee_jax.errors import InputError
from dsee_jax.models import deberta

HEADS, SIZE, WIDTH, LENGTH = 2, 3, 5, 4


@pytest.mark.parametrize("relative", [("c2p", "p2c"), ("p2c",), ("c2p",), ()])
@pytest.mark.parametrize("most", [6, 2])
def test_attention_is_the_paper_formula(relative, most):
    """Equation 4 by loops: (Qc Kc + Qc Kr[d(i, j)] + Kc Qr[d(j, i)]) / sqrt(terms * size), also for clipped distances."""
    span = min(LENGTH, most)
    more = {"unbiased": ("key",), "terms": 1 + len(relative), "relative": relative}
    module = deberta.Attention(heads=HEADS, head_size=SIZE, dropout_rate=0.0, width=WIDTH, **more)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    distances = generator.normal(size=(1, 2 * span, WIDTH)).astype(np.float32)
    seen = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    mask = seen[:, None, None, :]

    def run(params, queries=None):
        return module.apply({"params": params}, x, mask, True, queries, distances)

    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, mask, True, None, distances))["params"]
    params = jax.tree.map(lambda leaf: generator.normal(0.1, 0.3, leaf.shape).astype(leaf.dtype), params)
    assert ("position_key" in params, "position_query" in params) == ("c2p" in relative, "p2c" in relative)
    assert "bias" not in params["key"]

    def project(values, name):
        return values @ params[name]["kernel"] + params[name].get("bias", 0)

    def place(difference):
        return min(max(difference + span, 0), 2 * span - 1)

    expected = np.zeros((2, LENGTH, WIDTH))
    for row in range(2):
        q, k, v = (project(x[row], name) for name in ("query", "key", "value"))
        mixed = np.zeros((LENGTH, HEADS * SIZE))
        for head in (slice(0, 3), slice(3, 6)):
            for i in range(LENGTH):
                scores = np.full(LENGTH, -np.inf)
                for j in np.flatnonzero(seen[row]):
                    scores[j] = q[i, head] @ k[j, head]
                    if "c2p" in relative:
                        scores[j] += q[i, head] @ project(distances[0], "position_key")[place(i - j), head]
                    if "p2c" in relative:
                        # The released weights use i - j here too; the paper has j - i.
                        scores[j] += k[j, head] @ project(distances[0], "position_query")[place(i - j), head]
                weights = np.exp(scores / np.sqrt((1 + len(relative)) * SIZE))
                mixed[i, head] = weights / weights.sum() @ v[:, head]
        expected[row] = mixed @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(run(params), expected, atol=1e-5)
    np.testing.assert_allclose(run(params, 2), expected[:, :2], atol=1e-5)


def test_attention_terms_are_read_from_text_or_list():
    """The released models have a text."""
    configs = [
        deberta.Config.from_hf(tiny.config("deberta", pos_att_type=terms)) for terms in ("C2P | p2c", ["c2p", "p2c"])
    ]
    assert configs[0].terms == configs[1].terms == ("c2p", "p2c")
    assert deberta.Config.from_hf(tiny.config("deberta", pos_att_type=None)).terms == ()


def test_largest_distance_defaults_to_the_positions():
    assert deberta.Config.from_hf(tiny.config("deberta")).distance == 5
    assert deberta.Config.from_hf(tiny.config("deberta", max_relative_positions=-1)).distance == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_att_type": "c2p|p2p"}, r"'pos_att_type' is 'c2p\|p2p'; implemented: c2p, p2c, each once"),
        ({"pos_att_type": ["c2p", "c2p"]}, "each once"),
        ({"pos_att_type": 2}, "'pos_att_type' is 2"),
        ({"talking_head": True}, "'talking_head' is True, which is not implemented"),
        ({"embedding_size": 12}, "'embedding_size' is 12, which is not implemented; only 24 is"),
        ({"pooler_hidden_size": 12}, "'pooler_hidden_size' is 12"),
        ({"position_buckets": 256}, "unknown field 'position_buckets'"),
        ({"share_att_key": True}, "unknown field 'share_att_key'"),
        ({"type_vocab_size": -1}, "'type_vocab_size' is -1; expected a whole number from 0"),
        ({"max_relative_positions": "5"}, "'max_relative_positions' is '5'; expected a whole number"),
        ({"relative_attention": "yes"}, "'relative_attention' is 'yes'; implemented: True, False"),
        ({"pooler_hidden_act": "gelu_fast"}, "'pooler_hidden_act' is 'gelu_fast'"),
        ({"pooler_dropout": 1.5}, "'pooler_dropout' is 1.5"),
    ],
)
def test_bad_field_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        deberta.Config.from_hf(tiny.config("deberta", **changes))
