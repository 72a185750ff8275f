"""Decoders in Hugging Face folders, without torch: reading and writing."""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import decoders
import dsee_jax
from dsee_jax import models, tree
from dsee_jax.ckpt import hf, hf_names, hf_save, kept_units
from dsee_jax.errors import InputError
from dsee_jax.prune import compaction, units


def files(folder):
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].tobytes() == x.tobytes(), name


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_round_trip_is_bit_equal(tmp_path, variant):
    """In one file and in shards; the fields of config.json that determine the model are unchanged."""
    source = decoders.write(tmp_path / "a", shards=2, **decoders.VARIANTS[variant])
    model, params = hf.load_pretrained(source, "causal-lm")
    for size in ("5GB", "10KB"):
        hf_save.save_pretrained(tmp_path / size, model, params, source=source, max_shard_size=size)
        same(files(tmp_path / size), files(source))
        again, actual = hf.load_pretrained(tmp_path / size, "causal-lm")
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, actual, params)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "5GB"))
    other = ("architectures", "rope_parameters")
    assert before.items() <= (after | {name: before[name] for name in other if name in before}).items()
    assert after["architectures"] == [models.class_name(model)]


def test_generation_config_is_copied(tmp_path):
    source = decoders.write(tmp_path / "a", num_hidden_layers=1)
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 8]}\n')
    model, params = hf.load_pretrained(source, "causal-lm")
    hf_save.save_pretrained(tmp_path / "b", model, params, source=source)
    assert (tmp_path / "b" / "generation_config.json").read_text() == '{"eos_token_id": [7, 8]}\n'


@pytest.mark.parametrize("variant", ["llama, tied", "gpt2"])
def test_stored_tied_head_is_ignored(tmp_path, variant, caplog):
    """Some files repeat the tied head, and hold masks and constants of old versions."""
    source = decoders.write(tmp_path / "a", **decoders.VARIANTS[variant])
    _, expected = hf.load_pretrained(source, "causal-lm")
    embedding = files(source)["transformer.wte.weight" if variant == "gpt2" else "model.embed_tokens.weight"]
    more = {
        "lm_head.weight": embedding,
        "transformer.h.0.attn.bias": np.ones((1, 1, 3, 3), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    more = {
        name: x
        for name, x in more.items()
        if name.split(".")[0] in ("lm_head", next(iter(files(source))).split(".")[0])
    }
    save_file(files(source) | more, source / "model.safetensors")
    with caplog.at_level(logging.INFO):
        _, actual = hf.load_pretrained(source, "causal-lm")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert "not used" in caplog.text


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_names_without_prefix_are_read(tmp_path, variant):
    """As in the first GPT-2 checkpoints and in a written bare model."""
    source = decoders.write(tmp_path / "a", **decoders.VARIANTS[variant])
    model, params = hf.load_pretrained(source, "features")
    hf_save.save_pretrained(tmp_path / "b", model, params, source=source)
    assert not any(name.startswith(("model.", "transformer.")) for name in files(tmp_path / "b"))
    jax.tree.map(np.testing.assert_array_equal, hf.load_pretrained(tmp_path / "b", "features")[1], params)
    if variant == "gpt2":
        hf.load_pretrained(tmp_path / "b", "causal-lm")
    else:
        with pytest.raises(InputError, match=r"tensors missing \(1\): 'lm_head.weight'"):
            hf.load_pretrained(tmp_path / "b", "causal-lm")


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_missing_classifier_is_created(tmp_path, variant, caplog):
    source = decoders.write(tmp_path / "a", **decoders.VARIANTS[variant])
    _, params = hf.load_pretrained(source, num_labels=3)
    assert params["classifier"]["kernel"].shape == (24, 3)
    assert "lm_head" not in params
    assert "has no classifier/kernel: created at random" in caplog.text
    source = decoders.write(tmp_path / "b", labels=3, **decoders.VARIANTS[variant])
    _, params = hf.load_pretrained(source, num_labels=3)
    np.testing.assert_array_equal(params["classifier"]["kernel"], files(source)["score.weight"].T)


@pytest.mark.parametrize("variant", ["llama, biases", "qwen3", "gpt2"])
def test_compact_checkpoint_is_read_back(tmp_path, variant):
    """With shared tensors and a layer without heads; the expanded model is the masked model."""
    source = decoders.write(tmp_path / "a", **decoders.VARIANTS[variant])
    model, params = hf.load_pretrained(source, "causal-lm")
    count = model.config.widths["heads"][0]
    kept = {
        "heads": {"layer_0": np.zeros(count, bool), "layer_1": np.arange(count) > 0},
        "neurons": {"layer_1": np.arange(model.config.widths["neurons"][1]) % 3 > 0},
    }
    masks = units.masks(params, models.cuts(model), kept)
    small, small_params = dsee_jax.compact(model, params, masks)
    hf_save.save_pretrained(tmp_path / "b", small, small_params, source=source, kept=kept)
    again, actual = hf.load_pretrained(tmp_path / "b", "causal-lm")
    assert again == small
    jax.tree.map(np.testing.assert_array_equal, actual, small_params)
    full, dense = compaction.expand(again, actual, kept_units.read(tmp_path / "b"))
    hf_save.save_pretrained(tmp_path / "c", full, dense, source=source)
    masked = hf_names.hf_tensors(model, dsee_jax.masks.apply(params, masks))
    for name, x in files(tmp_path / "c").items():
        np.testing.assert_array_equal(x, masked[name], err_msg=name)


def test_param_paths_are_stable(tmp_path):
    """Rules in configs, adapters and recipes use these paths for every decoder."""
    trees = [
        tree.flatten(hf.load_pretrained(decoders.write(tmp_path / name, model_type=name), "causal-lm")[1])
        for name in ("llama", "gpt2")
    ]
    for path in (
        *(
            "embeddings/word/embedding",
            "norm/scale",
            "decoder/layer_1/attention_norm/scale",
            "decoder/layer_1/mlp_norm/scale",
        ),
        *(f"decoder/layer_1/attention/{name}/kernel" for name in ("query", "key", "value", "output")),
        *(f"decoder/layer_1/mlp/{name}/kernel" for name in ("up", "down")),
    ):
        assert all(path in flat for flat in trees), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama, tied", "qwen2, tied", "gpt2"])
def test_output_matrix_that_differs_from_a_tied_embedding_is_kept(tmp_path, variant, dtype, caplog):
    """The written model says that it is not tied; scanned, the model is untied too."""
    source = decoders.write(tmp_path / "a", **decoders.VARIANTS[variant])
    embedding = files(source)["transformer.wte.weight" if variant == "gpt2" else "model.embed_tokens.weight"]
    head = embedding.astype(np.dtype(dtype) if dtype == "float32" else ml_dtypes.bfloat16) * 1
    head[3, 4] += 1
    save_file(files(source) | {"lm_head.weight": head}, source / "model.safetensors")
    for scan in (False, True):
        caplog.clear()
        model, params = hf.load_pretrained(source, "causal-lm", scan=scan)
        np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T.astype(np.float32))
        assert not getattr(model.config, "tie_word_embeddings", None)
        assert "lm_head.weight differs from" in caplog.text
    hf_save.save_pretrained(tmp_path / "b", model, params, source=source)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    caplog.clear()
    np.testing.assert_array_equal(hf.load_pretrained(tmp_path / "b", "causal-lm")[1]["lm_head"]["kernel"], head.T)
    assert not caplog.text
    # Without a use for the output matrix, there is nothing to say.
    hf.load_pretrained(source, "features")
    assert "differs" not in caplog.text


@pytest.mark.parametrize("variant", ["llama, tied", "gpt2"])
def test_tied_matrix_is_read_under_the_name_of_the_head(tmp_path, variant):
    """A writer that drops the second name of shared tensors may drop the embedding's."""
    source = decoders.write(tmp_path / "a", **decoders.VARIANTS[variant])
    expected, arrays = hf.load_pretrained(source, "causal-lm"), files(source)
    name = "transformer.wte.weight" if variant == "gpt2" else "model.embed_tokens.weight"
    arrays["lm_head.weight"] = arrays.pop(name)
    save_file(arrays, source / "model.safetensors")
    model, params = hf.load_pretrained(source, "causal-lm")
    assert model == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    source = decoders.write(tmp_path / "a", num_hidden_layers=1)
    arrays = {name: x.astype(dtype) for name, x in files(source).items()}
    arrays["model.norm.weight"][-1] = value
    save_file(arrays, source / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors: 'model.norm.weight' holds NaN or infinities"):
        hf.load_pretrained(source, "causal-lm")


@pytest.mark.parametrize("variant", [name for name in decoders.VARIANTS if "gpt2" not in name])
@pytest.mark.parametrize("sourced", [False, True])
def test_rotary_parameters_are_written_in_both_layouts(tmp_path, variant, sourced):
    """A program that knows either layout reads the same theta and scaling, and so do we."""
    source = decoders.write(tmp_path / "a", **decoders.VARIANTS[variant])
    model, params = hf.load_pretrained(source, "causal-lm")
    hf_save.save_pretrained(tmp_path / "b", model, params, source=source if sourced else None)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    for dropped in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        left = {name: value for name, value in config.items() if name not in dropped}
        assert models.of_config(left).config.from_hf(left) == model.config
