"""Tiny GGUF files, written without the reader under test."""

import pathlib
import struct
from typing import Any

import numpy as np

import decoders
import tiny

MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "c", "a", "t", "ca", "cat"]
TOKENS += [f"[{number}]" for number in range(len(tiny.VOCABULARY) - len(TOKENS))]

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3 if token.startswith("[") else 1 for token in TOKENS],
    "tokenizer.ggml.merges": ["c a", "ca t"],
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}


def text(value: str | bytes) -> bytes:
    """A text with its length before it."""
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def entry(value: Any) -> bytes:
    """The code of the type of a metadata value, and the value."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<Ii", 5, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case list():
            items = [entry(item) for item in value]
            code = items[0][:4] if items else struct.pack("<I", 5)
            return struct.pack("<I", 9) + code + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
    raise TypeError(value)


def content(
    metadata: dict[str, Any], tensors: dict[str, np.ndarray | tuple[int, tuple[int, ...], bytes]], *, version: int = 3
) -> bytes:
    """The bytes of a file; a tensor is a float32 or float16 array, or (code of the type, shape, bytes)."""
    blocks = {
        name: (0 if tensor.dtype == np.float32 else 1, tensor.shape, tensor.tobytes())
        if isinstance(tensor, np.ndarray)
        else tensor
        for name, tensor in tensors.items()
    }
    header = b"GGUF" + struct.pack("<IQQ", version, len(blocks), len(metadata))
    header += b"".join(text(key) + entry(value) for key, value in metadata.items())
    data = b""
    for name, (code, shape, stored) in blocks.items():
        header += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, len(data))
        data += stored + bytes(-len(stored) % 32)
    return header + bytes(-len(header) % 32) + data


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head as llama.cpp stores them: one of the first half, one of the second, and so on."""
    size = len(array) // heads
    order = [
        head * size + half * (size // 2) + row for head in range(heads) for row in range(size // 2) for half in (0, 1)
    ]
    return array[order]


def name_of(name: str) -> str:
    """The name in a GGUF file of one of Hugging Face's tensors."""
    module, _, end = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{MODULES[part]}.{end}"
    return f"{MODULES[module]}.{end}"


def model(**changes: Any) -> tuple[dict, dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """A tiny decoder: config and tensors of Hugging Face, metadata and tensors of GGUF."""
    fields = decoders.config(**changes)
    kind = fields["model_type"]
    weights = decoders.weights(fields)
    heads = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}
    metadata = {
        "general.architecture": kind,
        f"{kind}.block_count": fields["num_hidden_layers"],
        f"{kind}.context_length": fields["max_position_embeddings"],
        f"{kind}.embedding_length": fields["hidden_size"],
        f"{kind}.feed_forward_length": fields["intermediate_size"],
        f"{kind}.attention.head_count": fields["num_attention_heads"],
        f"{kind}.attention.head_count_kv": fields["num_key_value_heads"],
        f"{kind}.attention.layer_norm_rms_epsilon": fields["rms_norm_eps"],
        f"{kind}.rope.freq_base": 100.0,
        **TOKENIZER,
    }
    stored = {}
    for name, array in weights.items():
        own = heads.get(name.split(".")[-2]) if kind == "llama" else None
        stored[name_of(name)] = interleaved(array, own) if own else array
    return fields, weights, metadata, stored


def write(path: pathlib.Path) -> pathlib.Path:
    """Write a tiny decoder, and return the path."""
    _, _, metadata, stored = model()
    path.write_bytes(content(metadata, stored))
    return path
