"""config.json: every field is used, checked or known to change nothing."""

import dataclasses

import pytest

import tiny
from dsee_jax.errors import InputError
from dsee_jax.models import MODELS, bert, fields, find


def test_reads_what_it_writes():
    """from_hf(write(config)) is the config; the run decides labels and dtype, not the file."""
    for name, module in MODELS.items():
        config = module.Config.from_hf(tiny.config(name, kept_heads=[2, 0]))
        assert module.Config.from_hf(fields.write(config)) == config
    config = bert.Config.from_hf(tiny.config(classifier_dropout=0.3), num_labels=3, dtype="bfloat16")
    assert (config.hidden_size, config.classifier_dropout, config.num_labels) == (24, 0.3, 3)
    assert bert.Config.from_hf(fields.write(config), num_labels=3, dtype="bfloat16") == config


def test_fields_that_change_nothing_are_passed_over():
    """What released BERT and MiniLM configs carry, and the storage dtype of the file."""
    extra = {
        "_name_or_path": "x",
        "transformers_version": "4.8.2",
        "gradient_checkpointing": False,
        "use_cache": True,
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "torch_dtype": "float16",
        "dtype": "float16",
        "bos_token_id": None,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "id2label": {"0": "a"},
    }
    assert bert.Config.from_hf(tiny.config(**extra)) == bert.Config.from_hf(tiny.config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type' is 'relative_key'.*only 'absolute'"),
        ({"is_decoder": True}, "'is_decoder' is True, which is not implemented"),
        ({"add_cross_attention": True}, "'add_cross_attention' is True"),
        ({"quantization_config": {"bits": 8}}, "'quantization_config' is {'bits': 8}"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "'auto_map'"),
        (
            {"hidden_act": "gelu_fast"},
            "'hidden_act' is 'gelu_fast'.*implemented: gelu, gelu_new, gelu_pytorch_tanh, relu",
        ),
        ({"layer_norm_epsilon": 1e-5, "layer_norm_eps": None}, "unknown field 'layer_norm_epsilon'"),
        ({"clasifier_dropout": 0.2}, r"unknown field 'clasifier_dropout' \(did you mean 'classifier_dropout'\?\)"),
        ({"num_attention_heads": 5}, "'hidden_size' is 24, not a multiple of 'num_attention_heads' = 5"),
        ({"vocab_size": 0}, "'vocab_size' is 0; expected a whole number from 1"),
        ({"hidden_size": "24"}, "'hidden_size' is '24'; expected a whole number"),
        ({"hidden_dropout_prob": 1.0}, r"'hidden_dropout_prob' is 1.0; expected a number in \[0, 1\)"),
    ],
)
def test_refused_by_name(change, message):
    """A field that would change the result, or that nobody knows, stops the reading."""
    with pytest.raises(InputError, match=message):
        bert.Config.from_hf(tiny.config(**change))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "'is_decoder' is True, which is not implemented; only False is"),
        ({"hiden_act": "relu"}, r"unknown field 'hiden_act'"),
        ({"vocab_size": 0}, "'vocab_size' is 0; expected a whole number from 1"),
        ({"kept_heads": [4, 1]}, "'kept_heads' holds 4; expected whole numbers from 0 to 3"),
    ],
)
def test_every_family_refuses_by_name(family, change, message):
    with pytest.raises(InputError, match=message):
        MODELS[family].Config.from_hf(tiny.config(family, **change))


def test_missing_size_names_the_near_field():
    """Sizes have no default, so that a typo never means BERT-base."""
    config = tiny.config()
    config["intermediate_sizes"] = config.pop("intermediate_size")
    with pytest.raises(InputError, match=r"'intermediate_size' is missing.*did you mean 'intermediate_sizes'"):
        bert.Config.from_hf(config)


def test_run_choices_are_checked():
    """dtype and num_labels come from the command line."""
    with pytest.raises(InputError, match=r"'dtype' is 'float16'.*implemented: float32, bfloat16"):
        bert.Config.from_hf(tiny.config(), dtype="float16")
    with pytest.raises(InputError, match="'num_labels' is 0"):
        bert.Config.from_hf(tiny.config(), num_labels=0)


def test_unknown_model_type_lists_the_known():
    """One line with the nearest name and all there are."""
    with pytest.raises(InputError, match=r"'brt' is not supported \(did you mean 'bert'\?\); supported: bert"):
        find("brt")


@pytest.mark.parametrize("module", MODELS.values(), ids=MODELS)
def test_config_is_a_frozen_hashable_dataclass(module):
    """Models are static arguments of jit."""
    config = module.Config.from_hf(tiny.config(module.Config.model_type))
    assert hash(config) == hash(dataclasses.replace(config))
