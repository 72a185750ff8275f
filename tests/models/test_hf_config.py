"""config.json: every field is used, checked or known to be irrelevant."""

import dataclasses
import json
import re

import pytest

import decoders
import tiny
from dsee_jax.errors import InputError
from dsee_jax.models import MODELS, bert, find, hf_config, llama, of_config, rope, shapes


def test_written_config_is_read_back():
    """from_hf(write(config)) equals the config; the run sets num_labels and dtype."""
    for name in MODELS.keys() - {*decoders.KINDS}:
        architecture = MODELS[name]
        numbers = {"kept_head_numbers": [[0, 2], []]} if name == "mpnet" else {}
        config = architecture.config.from_hf(tiny.config(name, kept_heads=[2, 0], **numbers))
        assert architecture.config.from_hf(hf_config.write(config)) == config
    config = bert.Config.from_hf(tiny.config(classifier_dropout=0.3), num_labels=3, dtype="bfloat16")
    assert (config.hidden_size, config.classifier_dropout, config.num_labels) == (24, 0.3, 3)
    assert bert.Config.from_hf(hf_config.write(config), num_labels=3, dtype="bfloat16") == config


def test_irrelevant_fields_are_ignored():
    """The further fields of released BERT and MiniLM configs, and the storage dtype."""
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


RELEASED = {
    "SmolLM2": (
        "llama",
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "transformers.js_config": {"dtype": "q4"},
            "pretraining_tp": 2,
        },
    ),
    "Unsloth": (
        "llama",
        {"unsloth_fixed": True, "unsloth_version": "2025.1.1", "neftune_noise_alpha": 5, "max_sequence_length": 2048},
    ),
    "Qwen2.5 with long texts": ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}, "use_mrope": False}),
    "GPT-2 medium": ("gpt2", {"n_special": 0, "predict_special_tokens": True, "n_ctx": 1024, "summary_use_proj": True}),
    "cross-encoder": ("bert", {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}),
    "cross-encoder of today": ("roberta", {"sentence_transformers": {"activation_fn": "torch.nn.Identity"}}),
    "first RoBERTa": (
        "roberta",
        {"eos_token_ids": None, "output_past": True, "do_sample": False, "embedding_size": 24},
    ),
    "AdapterHub": ("xlm-roberta", {"adapters": {"adapters": {}}, "prediction_heads": {}, "custom_heads": {}}),
    "AutoTrain": ("bert", {"max_length": 64, "padding": "max_length"}),
    "a field that is not set": ("llama", {"num_experts_per_tok": None}),
    "AWS": ("bert", {"neuron": {"compiler_type": "neuronx-cc"}, "fp16": True}),
}
"""Fields of released models that change no number."""


@pytest.mark.parametrize("source", RELEASED)
def test_fields_of_released_models_change_nothing(source):
    kind, fields = RELEASED[source]
    make = decoders.config if kind in decoders.KINDS else tiny.config
    read = MODELS[kind].config.from_hf
    assert read(make(model_type=kind) | fields) == read(make(model_type=kind))


def test_every_harmless_field_has_one_reason():
    names = ["_name_or_path", "n_special", "sbert_ce_default_activation_function", "top_k", "dtype", "eos_token_ids"]
    for name in names:
        assert len([pattern for pattern, _ in hf_config.HARMLESS if re.fullmatch(pattern, name)]) == 1, name
    assert all(reason for _, reason in hf_config.HARMLESS)


def test_unknown_field_can_be_allowed(caplog):
    """A field that is known to change the numbers stays an error."""
    fields = tiny.config(attention_sinks=4)
    with pytest.raises(InputError, match=r"unknown field 'attention_sinks'.*model.allow_unknown: true"):
        bert.Config.from_hf(fields)
    assert bert.Config.from_hf(fields, allow_unknown=True) == bert.Config.from_hf(tiny.config())
    assert "unknown field 'attention_sinks' = 4 is ignored" in caplog.text
    with pytest.raises(InputError, match="'quantization_config'"):
        bert.Config.from_hf(tiny.config(quantization_config={"bits": 4}), allow_unknown=True)


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
            "'hidden_act' is 'gelu_fast'.*implemented: gelu, gelu_new, gelu_pytorch_tanh, relu, silu",
        ),
        ({"layer_norm_epsilon": 1e-5, "layer_norm_eps": None}, "unknown field 'layer_norm_epsilon'"),
        ({"clasifier_dropout": 0.2}, r"unknown field 'clasifier_dropout' \(did you mean 'classifier_dropout'\?\)"),
        ({"num_attention_heads": 5}, "'hidden_size' is 24, not a multiple of 'num_attention_heads' = 5"),
        ({"vocab_size": 0}, "'vocab_size' is 0; expected a whole number from 1"),
        ({"hidden_size": "24"}, "'hidden_size' is '24'; expected a whole number"),
        ({"hidden_dropout_prob": 1.0}, r"'hidden_dropout_prob' is 1.0; expected a number in \[0, 1\)"),
    ],
)
def test_bad_field_is_named(change, message):
    """A field that would change the result, or an unknown field, is an error."""
    with pytest.raises(InputError, match=message):
        bert.Config.from_hf(tiny.config(**change))


@pytest.mark.parametrize("family", [name for name in MODELS if name not in decoders.KINDS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "'is_decoder' is True, which is not implemented; only False is"),
        ({"hiden_act": "relu"}, r"unknown field 'hiden_act'"),
        ({"vocab_size": 0}, "'vocab_size' is 0; expected a whole number from 1"),
        ({"kept_heads": [4, 1]}, "'kept_heads' holds 4; expected whole numbers from 0 to 3"),
    ],
)
def test_every_encoder_names_a_bad_field(family, change, message):
    with pytest.raises(InputError, match=message):
        MODELS[family].config.from_hf(tiny.config(family, **change))


def test_missing_size_names_the_near_field():
    """Sizes have no default, so a typo never selects BERT-base."""
    config = tiny.config()
    config["intermediate_sizes"] = config.pop("intermediate_size")
    with pytest.raises(InputError, match=r"'intermediate_size' is missing.*did you mean 'intermediate_sizes'"):
        bert.Config.from_hf(config)


def test_run_options_are_checked():
    """The run sets dtype and num_labels."""
    with pytest.raises(InputError, match=r"'dtype' is 'float16'.*implemented: float32, bfloat16"):
        bert.Config.from_hf(tiny.config(), dtype="float16")
    with pytest.raises(InputError, match="'num_labels' is 0"):
        bert.Config.from_hf(tiny.config(), num_labels=0)


@pytest.mark.parametrize("kind", ["distilbert", "electra", "modernbert", "camembert", "deberta-v2", "berd"])
def test_unknown_model_type_lists_supported_ones(kind):
    """Another architecture is no misspelling: the line suggests none of them."""
    with pytest.raises(InputError, match=rf"'{kind}' is not supported; supported: bert, .*qwen3$"):
        find(kind)


@pytest.mark.parametrize(
    ("classes", "fix"),
    [
        (["BertForMaskedLM"], 'the file is of the class BertForMaskedLM: add "model_type": "bert"'),
        (["XLMRobertaModel"], 'of the class XLMRobertaModel: add "model_type": "xlm-roberta"'),
        (["Qwen3ForCausalLM"], 'add "model_type": "qwen3"'),
        (["SomeModel", 3], "add the kind of the model, one of bert, "),
        ("BertModel", "add the kind of the model, one of bert, "),
        (None, "add the kind of the model, one of bert, "),
    ],
)
def test_missing_model_type_is_told_by_the_class(classes, fix):
    with pytest.raises(InputError, match=f"'model_type' is missing; .*{fix}"):
        of_config({"architectures": classes, "hidden_size": 3})


@pytest.mark.parametrize("kind", MODELS)
def test_config_is_hashable(kind):
    """Models are static arguments of jit."""
    fields = decoders.config(model_type=kind) if kind in decoders.KINDS else tiny.config(kind)
    config = MODELS[kind].config.from_hf(fields)
    assert config.model_type == kind
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_written_decoder_config_is_read_back(variant):
    """Every option is read back, and so are pruned widths."""
    config = find(decoders.config(**decoders.VARIANTS[variant])["model_type"]).config.from_hf
    first = config(decoders.config(**decoders.VARIANTS[variant]))
    assert config({"model_type": first.model_type, **hf_config.write(first)}) == first
    pruned = first.with_widths(heads=[1, 0], neurons=[0, 7])
    written = json.loads(json.dumps(hf_config.write(pruned)))
    assert written["kept_heads"] == [1, 0]
    assert config({"model_type": first.model_type, **written}) == pruned


def narrowed(fields, **widths):
    """Return the fields in which the config.json of a narrower model differs from that of the model."""
    config = find(fields["model_type"]).config.from_hf(fields)
    before, after = hf_config.write(config), hf_config.write(config.with_widths(**widths))
    return {name: value for name, value in after.items() if value != before.get(name)}


@pytest.mark.parametrize(
    ("fields", "heads", "neurons", "expected"),
    [
        (tiny.config(), (3, 3), (24, 24), {"intermediate_size": 24}),
        (tiny.config(), (2, 2), (24, 24), {"intermediate_size": 24, "kept_heads": (2, 2)}),
        (tiny.config(), None, (24, 23), {"kept_neurons": (24, 23)}),
        (tiny.config(), None, (0, 0), {"kept_neurons": (0, 0)}),
        (decoders.config(model_type="gpt2"), (2, 2), (80, 80), {"n_inner": 80, "kept_heads": (2, 2)}),
        (
            decoders.config(),
            (1, 1),
            (24, 24),
            {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 24},
        ),
        # LlamaConfig needs a hidden_size, here 24, that is a multiple of the heads.
        (decoders.config(num_attention_heads=5, num_key_value_heads=5, head_dim=4), None, (40, 40), {}),
        (decoders.config(num_attention_heads=6, num_key_value_heads=6), (5, 5), None, {"kept_heads": (5, 5)}),
        (
            decoders.config(model_type="mistral", num_attention_heads=6, num_key_value_heads=6),
            (5, 5),
            None,
            {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4},
        ),
        (decoders.config(), (0, 0), None, {"kept_heads": (0, 0)}),
        (decoders.config(), (2, 1), None, {"kept_heads": (2, 1)}),
    ],
)
def test_equal_numbers_of_units_become_standard_fields(fields, heads, neurons, expected):
    assert narrowed(fields, heads=heads, neurons=neurons) == expected


def test_equal_kept_numbers_are_read_as_standard_fields():
    """An earlier layout had the numbers of the unpruned model in the standard fields."""
    config = bert.Config.from_hf(tiny.config(kept_heads=[3, 3], kept_neurons=[24, 24]))
    assert config == bert.Config.from_hf(tiny.config(intermediate_size=24))


def test_per_layer_config_repeats_the_numbers_of_each_layer():
    """As transformers 5 reads it; a layer without heads has no standard fields, and LlamaConfig refuses other heads."""
    config = llama.Config.from_hf(decoders.config(model_type="mistral", num_key_value_heads=3, head_dim=4))
    assert hf_config.per_layer(config.with_widths(heads=(3, 2), neurons=(24, 40))) == {
        "0": {"intermediate_size": 24},
        "1": {"num_attention_heads": 4, "num_key_value_heads": 2},
    }
    assert hf_config.per_layer(config.with_widths(heads=(2, 2), neurons=(24, 24))) == {}
    assert hf_config.per_layer(config.with_widths(heads=(3, 0))) == {}
    assert hf_config.per_layer(dataclasses.replace(config, model_type="llama").with_widths(heads=(3, 2))) == {}
    fields = tiny.config(kept_neurons=[40, 24], per_layer_config={"1": {"intermediate_size": 24}})
    assert bert.Config.from_hf(fields).widths["neurons"] == (40, 24)
    with pytest.raises(InputError, match="'per_layer_config' is .*, which is not implemented; it may only repeat"):
        bert.Config.from_hf(tiny.config(per_layer_config={"1": {"intermediate_size": 24}}))


def test_both_layouts_of_rotary_parameters_are_read():
    """rope_theta and rope_scaling of earlier versions, and rope_parameters."""
    old = {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6}}
    read = lambda fields: llama.Config.from_hf(decoders.config(**fields))
    assert read(old) == read(new)
    assert read({"rope_parameters": None}).rope_parameters == rope.DEFAULT
    assert read({"rope_parameters": None, "rope_theta": 7.0}).rope_parameters == rope.Rope(rope_theta=7.0)
    assert read(old | new) == read(new)


def test_parameter_of_another_scaling_is_named(caplog):
    llama.Config.from_hf(decoders.config(rope_parameters={"rope_type": "linear", "factor": 2, "beta_fast": 4}))
    assert "'rope_type' 'linear' does not read 'beta_fast'" in caplog.text
    caplog.clear()
    for variant in ("llama, linear", "llama, dynamic", "llama, llama3", "llama, yarn"):
        llama.Config.from_hf(decoders.config(**decoders.VARIANTS[variant]))
    assert not caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "'rope_type' 'longrope' is not implemented.*implemented: default",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2}},
            "'low_freq_factor' is missing; 'rope_type' 'llama3' needs",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "finetuned": True}}, "unknown parameter 'finetuned'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "'factor' is '2'; expected a number above 0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is not implemented"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2}, "head_dim": 2}, "a head has 2 entries; .* needs 4"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 1e300}},
            "'factor' is 1e\\+300; expected a number above 0",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "'factor' is nan; expected a number"),
        ({"rope_parameters": {"rope_theta": 1}}, "'rope_theta' is 1; expected a number above 1"),
        (
            {"rope_parameters": decoders.LLAMA3 | {"high_freq_factor": 1.0}},
            "'high_freq_factor' is not above 'low_freq_factor'",
        ),
        ({"num_hidden_layers": 10**6}, "'num_hidden_layers' is 1000000; expected a whole number from 1 to 1024"),
        ({"head_dim": 10**9}, "'head_dim' is 1000000000; expected a whole number from 1 to"),
        ({"pad_token_id": [[1]]}, r"'pad_token_id' is \(\(1,\),\); expected a whole number or null"),
        ({"pad_token_id": "x"}, "'pad_token_id' is 'x'; expected a whole number or null"),
        ({"model_type": "gpt2", "n_layer": 10**6}, "'n_layer' is 1000000; expected a whole number from 1 to 1024"),
        ({"rope_parameters": [1]}, r"'rope_parameters' is \[1\]; expected an object"),
        (
            {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0},
            "'rope_theta' is 7.0 and 5.0: keep the intended value",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 3}, "rope_scaling": {"type": "linear", "factor": 2}},
            "'rope_scaling' is .*2.* and 'rope_parameters' .*3.*: keep the intended one",
        ),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5, which is not implemented"),
        ({"rope_interleaved": True}, "'rope_interleaved' is True, which is not implemented"),
        ({"quantization": {"bits": 4}}, "'quantization' is {'bits': 4}, so the weights are quantised"),
        (
            {"quantization_config": {"x": "y" * 999}},
            r"'quantization_config' is .{99,110}\.\.\., so the weights are quantised",
        ),
        ({"sliding_window": 8}, "'sliding_window' is 8, which is not implemented"),
        ({"model_type": "mistral", "attention_bias": True}, "'attention_bias' is True, which is not implemented"),
        ({"model_type": "qwen2", "attention_bias": False}, "'attention_bias' is False, which is not implemented"),
        ({"model_type": "qwen2", "use_mrope": True}, "'use_mrope' is True"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "'layer_types' is .*for each of the 2 layers"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2},
            "'layer_types' is .*with use_sliding_window",
        ),
        ({"num_key_value_heads": 4}, "'num_attention_heads' is 6, not a multiple of 'num_key_value_heads' = 4"),
        ({"hidden_size": 25}, "'hidden_size' is 25, not a multiple"),
        ({"head_dim": 5}, "a head has 5 entries; rotary positions need an even number"),
        ({"hidden_act": "swish"}, "'hidden_act' is 'swish'"),
        ({"model_type": ["llama"]}, r"'model_type' \['llama'\] is not supported"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, r"'rope_type' \['linear'\] is not implemented"),
        ({"attention_bias": "false"}, "'attention_bias' is 'false'; expected true or false"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1; expected true or false"),
        ({"model_type": "qwen3", "layer_types": 5}, "'layer_types' is 5; expected full_attention"),
        ({"model_type": "qwen2", "max_window_layers": "1"}, "'max_window_layers' is '1'; expected a whole number"),
        ({"model_type": "gpt2", "scale_attn_weights": "no"}, "'scale_attn_weights' is 'no'; expected true or false"),
        ({"model_type": "gpt2", "n_head": 5}, "'n_embd' is 24, not a multiple of 'n_head' = 5"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "'add_cross_attention' is True"),
        ({"model_type": "gpt2", "n_inner": 0}, "'n_inner' is 0"),
        ({"model_type": "gpt2", "activation_function": "mish"}, "'activation_function' is 'mish'"),
        ({"model_type": "gpt2", "n_ctxs": 3}, "unknown field 'n_ctxs'"),
    ],
)
def test_bad_decoder_field_is_named(change, message):
    with pytest.raises(InputError, match=message):
        find(change.get("model_type", "llama")).config.from_hf(decoders.config(**change))


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "'quantization_config' is .*, so the weights are quantised"),
        ({"vocab_size": 0}, "'vocab_size' is 0; expected a whole number from 1"),
        ({"attention_sinks": 4}, "unknown field 'attention_sinks'"),
    ],
)
def test_field_of_no_family_is_refused(kind, change, message):
    made = tiny.config if kind in tiny.FAMILIES else decoders.config
    with pytest.raises(InputError, match=message):
        find(kind).config.from_hf(made(**{"model_type": kind} | change))


def test_null_window_is_off():
    """As in Hugging Face's classes; mistral lacks the field, so its window applies."""
    fields = {"model_type": "qwen2", "use_sliding_window": None, "sliding_window": 4, "max_window_layers": 0}
    assert llama.Config.from_hf(decoders.config(**fields)).windows == (None, None)
    assert llama.Config.from_hf(decoders.config(model_type="mistral", sliding_window=4)).windows == (4, 4)


@pytest.mark.parametrize(
    ("parameters", "longest"),
    [
        ({"rope_type": "default"}, 32),
        ({"rope_type": "linear", "factor": 3.0}, 96),
        ({"rope_type": "dynamic", "factor": 2.5}, 80),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 32),
    ],
)
def test_scaled_positions_allow_longer_texts(parameters, longest):
    assert llama.Config.from_hf(decoders.config(rope_parameters=parameters)).longest == longest


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_transformers_field_is_known(name):
    """The default config of transformers, with every field written, is read; required fields have the same values."""
    from transformers import CONFIG_MAPPING

    written = json.loads(CONFIG_MAPPING[name]().to_json_string(use_diff=False))
    config = find(name).config.from_hf(written)
    for field in dataclasses.fields(config):
        if field.default is dataclasses.MISSING:
            assert getattr(config, field.name) == written[field.name]


VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        10**6,
        2**31,
        2**63,
        10**400,
        0.5,
        1e308,
        float("nan"),
        float("inf"),
        -float("inf"),
    ),
    *("", "x", "1", "a" * 1000, [], [1], [[1]], [None], ["x", {}], {}, {"a": 1}, {"rope_type": []}),
    *({"rope_type": kind, "factor": factor} for kind in rope.NEEDED for factor in (1e-300, 2, 1e300, float("inf"))),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_any_value_of_any_field_is_read_or_one_line(kind):
    """A config that is read gives a model of known shapes, and is written as JSON."""
    base = (decoders.config if kind in decoders.KINDS else tiny.config)(model_type=kind)
    architecture = MODELS[kind]
    more = (
        "rope_theta",
        "rope_scaling",
        "id2label",
        "architectures",
        "eos_token_id",
        "quantization_config",
        "auto_map",
    )
    for field in sorted(
        {*base, *more, *(field.name for field in dataclasses.fields(architecture.config))} - {*hf_config.RUN}
    ):
        for value in VALUES:
            config, line = None, ""
            try:
                config = of_config(base | {field: value}).config.from_hf(base | {field: value})
            except InputError as error:
                line = str(error)
            assert "\n" not in line, (field, value)
            assert len(line) < 2000, (field, value)
            if config is None:
                continue
            json.dumps(hf_config.write(config))
            if field not in ("id2label", "architectures", "eos_token_id", "_name_or_path"):
                shapes(architecture.model(config, next(iter(architecture.tasks))))
