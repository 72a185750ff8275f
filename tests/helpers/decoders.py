"""Tiny random decoders in Hugging Face's layout, without torch and without the tables under test."""

import json
import pathlib
import re
from collections.abc import Iterator

import numpy as np

import tiny

KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Every ``model_type`` of a decoder."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}

VARIANTS: dict[str, dict] = {
    "llama": {},
    "llama, a key for every query": {"num_key_value_heads": 6},
    "llama, one key": {"num_key_value_heads": 1},
    "llama, heads of their own size": {"head_dim": 10},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, gelu": {"hidden_act": "gelu", "rms_norm_eps": 1e-2},
    "llama, linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 20.0}},
    "llama, dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 8},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "llama, yarn": {"rope_parameters": YARN},
    "llama, yarn of other terms": {
        "rope_parameters": YARN
        | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
    },
    "llama, yarn of a given amplitude": {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "llama, fields of earlier versions": {
        "rope_parameters": None,
        "rope_theta": 30.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None, "head_dim": 10},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, windows above": {"model_type": "qwen2", "max_window_layers": 1, **WINDOW},
    "qwen3": {"model_type": "qwen3", "head_dim": 10},
    "qwen3, tied": {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
    "qwen3, biases and windows": {
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"],
        **WINDOW,
    },
    "gpt2": {"model_type": "gpt2"},
    "gpt2, other fields": {
        "model_type": "gpt2",
        "activation_function": "relu",
        "n_inner": 40,
        "layer_norm_epsilon": 1e-2,
    },
    "gpt2, scores by layer": {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
    "gpt2, scores as they are": {
        "model_type": "gpt2",
        "scale_attn_weights": False,
        "reorder_and_upcast_attn": True,
        "initializer_range": 0.2,
    },
    "gpt2, not tied": {"model_type": "gpt2", "tie_word_embeddings": False},
}
"""Every option of every family, as changes of `config`."""

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": len(tiny.VOCABULARY),
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def config(**changes) -> dict:
    """Return the config.json of a tiny decoder whose sizes are all different; a change to None leaves the field out."""
    if changes.get("model_type") == "gpt2":
        return GPT2 | changes
    fields = {
        "model_type": "llama",
        "vocab_size": len(tiny.VOCABULARY),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }
    if changes.get("sliding_window", 0) is None:
        fields["sliding_window"] = None
        changes = {name: value for name, value in changes.items() if name != "sliding_window"}
    return {name: value for name, value in (fields | changes).items() if value is not None or name == "sliding_window"}


def weights(fields: dict, *, seed: int = 0, labels: int = 0) -> dict[str, np.ndarray]:
    """Return random float32 tensors under the names of the causal language model, or, with ``labels``, of the classifier."""
    shapes = dict(_gpt2(fields) if fields["model_type"] == "gpt2" else _llama(fields))
    width = shapes["transformer.wte.weight" if fields["model_type"] == "gpt2" else "model.embed_tokens.weight"][1]
    if labels:
        shapes["score.weight"] = (labels, width)
    elif not fields.get("tie_word_embeddings", fields["model_type"] == "gpt2"):
        shapes["lm_head.weight"] = (fields["vocab_size"], width)
    generator = np.random.default_rng(seed)
    tensors = {name: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: 1 + x if re.search(r"(norm|ln_\w)\.weight$", name) else x for name, x in tensors.items()}


def _gpt2(fields: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = fields["n_embd"]
    neurons = fields.get("n_inner") or 4 * width
    yield "transformer.wte.weight", (fields["vocab_size"], width)
    yield "transformer.wpe.weight", (fields["n_positions"], width)
    for layer in range(fields["n_layer"]):
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, neurons),
            ("mlp.c_proj", neurons, width),
        ):
            yield f"transformer.h.{layer}.{name}.weight", (rows, columns)
            yield f"transformer.h.{layer}.{name}.bias", (columns,)
    for name in (*(f"h.{layer}.ln_{part}" for layer in range(fields["n_layer"]) for part in (1, 2)), "ln_f"):
        yield f"transformer.{name}.weight", (width,)
        yield f"transformer.{name}.bias", (width,)


def _llama(fields: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, neurons, kind = fields["hidden_size"], fields["intermediate_size"], fields["model_type"]
    size = fields.get("head_dim") or width // fields["num_attention_heads"]
    inner, outer = size * fields["num_attention_heads"], size * fields["num_key_value_heads"]
    yield "model.embed_tokens.weight", (fields["vocab_size"], width)
    yield "model.norm.weight", (width,)
    for layer in range(fields["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part, rows in (("q", inner), ("k", outer), ("v", outer)):
            yield f"{name}.self_attn.{part}_proj.weight", (rows, width)
            if kind == "qwen2" or fields.get("attention_bias"):
                yield f"{name}.self_attn.{part}_proj.bias", (rows,)
        yield f"{name}.self_attn.o_proj.weight", (width, inner)
        if fields.get("attention_bias"):
            yield f"{name}.self_attn.o_proj.bias", (width,)
        for part, shape in (("gate", (neurons, width)), ("up", (neurons, width)), ("down", (width, neurons))):
            yield f"{name}.mlp.{part}_proj.weight", shape
            if fields.get("mlp_bias"):
                yield f"{name}.mlp.{part}_proj.bias", shape[:1]
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{part}.weight", (width,)
        for part in ("q", "k") if kind == "qwen3" else ():
            yield f"{name}.self_attn.{part}_norm.weight", (size,)


def write(folder: pathlib.Path, *, seed: int = 0, labels: int = 0, shards: int = 1, **changes) -> pathlib.Path:
    """Write a checkpoint folder whose tokenizer has no padding token, and return the folder."""
    fields = config(**changes)
    tiny.write(folder, fields, weights(fields, seed=seed, labels=labels), shards=shards)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("pad_token", "tokenizer_class")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def sides(batch: dict[str, np.ndarray], side: str) -> dict[str, np.ndarray]:
    """Return a batch from `tiny.batch` with the padding on one side."""
    batch = {name: x for name, x in batch.items() if name != "token_type_ids"}
    if side == "right":
        return batch
    flip = lambda x, mask: np.stack([np.roll(row, len(row) - m.sum()) for row, m in zip(x, mask, strict=True)])
    return {name: flip(x, batch["attention_mask"]) for name, x in batch.items()}
