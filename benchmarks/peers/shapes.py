"""Models of random weights in the shapes of released ones, as Hugging Face folders: speed does not depend on the values.

    python -m benchmarks.peers.shapes NAME FOLDER [--tuned]

The weights of a name are always the same. A folder of an encoder has a tokenizer of letters, which is enough for a run. With
``--tuned`` the folder has the models of a merge, `TUNED`: a base and two that were tuned from it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def _bert(layers: int, width: int, heads: int, vocabulary: int = 30522, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "pad_token_id": 0,
    } | more


def _gpt2(layers: int, width: int, heads: int, vocabulary: int = 50257) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocabulary,
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "n_positions": 1024,
        "initializer_range": 0.02,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": vocabulary - 1,
    }


def _llama(
    layers: int, width: int, inner: int, heads: int, key_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


SHAPES: dict[str, dict[str, Any]] = {
    "minilm": _bert(6, 384, 12),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, 49152, tie_word_embeddings=True),
    "stories260k": _llama(5, 64, 172, 8, 4, 512, tie_word_embeddings=True),
    "llama-1.1b": _llama(22, 2048, 5632, 32, 4, 32000, dtype="bfloat16"),
    "llama-4.5b": _llama(29, 3584, 9856, 32, 8, 64000, dtype="bfloat16"),
    "llama-7b": _llama(32, 4096, 11008, 32, 32, 32000, dtype="bfloat16"),
    "tiny-bert": _bert(2, 64, 4, 500),
    "tiny-gpt2": _gpt2(2, 64, 4, 500),
    "tiny-llama": _llama(2, 64, 128, 4, 2, 500, tie_word_embeddings=True),
    "tiny-llama-bfloat16": _llama(2, 64, 128, 4, 2, 500, dtype="bfloat16"),
}
"""Name -> content of config.json."""

DRAWN = 1 << 22
"""The numbers of a large tensor repeat after so many; more draws take too long."""

TUNED = ("base", "model_a", "model_b")
"""The folders of a merge."""


def task(name: str) -> str:
    """Return the task of a model: of a BERT classification, else causal-lm."""
    return "sequence-classification" if SHAPES[name]["model_type"] == "bert" else "causal-lm"


def sizes(name: str) -> tuple[int, int, int, int, int]:
    """Return (layers, width, width of keys and values, width of the feed-forward part, vocabulary) of a model."""
    config = SHAPES[name]
    if config["model_type"] == "gpt2":
        width = config["n_embd"]
        return config["n_layer"], width, width, 4 * width, config["vocab_size"]
    width, heads = config["hidden_size"], config["num_attention_heads"]
    keys = width * config.get("num_key_value_heads", heads) // heads
    return config["num_hidden_layers"], width, keys, config["intermediate_size"], config["vocab_size"]


def flops(name: str, batch: int, length: int) -> float:
    """Return the FLOPs of the forward pass of a batch without padding: matrix products, a multiply-add counts 2.

    A training step of updates on frozen weights needs twice as many: no kernel has a gradient. Causal attention counts in
    full.
    """
    layers, width, keys, inner, vocabulary = sizes(name)
    llama = SHAPES[name]["model_type"] == "llama"
    kernels = 2 * width * width + 2 * width * keys + (3 if llama else 2) * width * inner
    attention = 2 * length * width
    per_token = layers * (kernels + attention) + (0 if task(name) == "sequence-classification" else width * vocabulary)
    return 2.0 * batch * length * per_token


def write(name: str, folder: Path, *, tuning: int = 0) -> None:
    """Write the folder of a model in three shards at most, completely or not at all; a folder that exists stays.

    ``tuning`` is 0, or the number of a model tuned from it: small changes, whose size differs between tensors.
    """
    if folder.exists():
        return
    import ml_dtypes
    import numpy as np

    from dsee_jax import models
    from dsee_jax.ckpt import hf_names, tensors
    from dsee_jax.runtime import atomic

    config = SHAPES[name]
    architecture = models.find(config["model_type"])
    labels: dict[str, Any] = {"num_labels": 2} if task(name) == "sequence-classification" else {}
    model = architecture.model(architecture.config.from_hf(config, **labels), task(name))
    kind = np.dtype(ml_dtypes.bfloat16 if config.get("dtype") == "bfloat16" else np.float32)
    shapes = hf_names.stored_shapes(model)
    numbers = {tensor: number for number, tensor in enumerate(shapes)}

    def normal(seed: list[int], size: int, scale: float) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(min(DRAWN, size), np.float32) * np.float32(scale)

    def array(tensor: str) -> np.ndarray:
        shape, number = shapes[tensor], numbers[tensor]
        if len(shape) == 1:
            return np.full(shape, 0 if tensor.endswith("bias") else 1, kind)
        size = int(np.prod(shape))
        drawn = normal([number], size, 0.02)
        if tuning:
            drawn += normal([number, tuning], size, 2e-4 * np.random.default_rng([number, tuning]).uniform(0.5, 2))
        return np.resize(drawn.astype(kind), shape)

    kinds = {tensor: ("BF16" if kind.itemsize == 2 else "F32", shape) for tensor, shape in shapes.items()}
    total = kind.itemsize * sum(int(np.prod(shape)) for shape in shapes.values())
    with atomic.folder(folder) as partial:
        tensors.write_each(partial, kinds, array, max_shard_size=max(total * 2 // 5, 1 << 30))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if config["model_type"] == "bert":
            _tokenizer(partial, config["vocab_size"])


def _tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a WordPiece tokenizer whose pieces are single characters, beside as many unused ones as the vocabulary has."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{each}" for each in characters)]
    words += [f"[unused{number}]" for number in range(vocabulary - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    parts = {each: number for number, each in enumerate(TUNED)} if "--tuned" in sys.argv else {"": 0}
    for part, number in parts.items():
        write(sys.argv[1], Path(sys.argv[2]) / part, tuning=number)
