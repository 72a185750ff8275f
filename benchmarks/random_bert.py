"""Write a BERT of random weights in Hugging Face layout, so that time and memory are measured without a download.

``python -m benchmarks.random_bert OUT --size base``
"""

import argparse
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

SIZES = {  # layers, width, heads
    "tiny": (2, 128, 2),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}


def config(size: str, vocabulary: int = 30522, positions: int = 512) -> dict:
    """Return the ``config.json`` of a BERT of this size."""
    layers, width, heads = SIZES[size]
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "pad_token_id": 0,
    }


def tensors(settings: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Return ``{name: array}``: normal(0, 0.02) matrices ``(out, in)``, biases 0, layer norm weights 1."""
    rng = np.random.default_rng(seed)
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    out: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"] = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)

    def linear(name: str, rows: int, columns: int) -> None:
        matrix(name, rows, columns)
        out[f"{name}.bias"] = np.zeros(rows, np.float32)

    def norm(name: str) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = np.ones(width, np.float32), np.zeros(width, np.float32)

    for kind, rows in (
        ("word", settings["vocab_size"]),
        ("position", settings["max_position_embeddings"]),
        ("token_type", settings["type_vocab_size"]),
    ):
        matrix(f"bert.embeddings.{kind}_embeddings", rows, width)
    norm("bert.embeddings.LayerNorm")
    for number in range(settings["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{number}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", width, width)
        linear(f"{layer}.attention.output.dense", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, width)
        linear(f"{layer}.output.dense", width, inner)
        norm(f"{layer}.output.LayerNorm")
    linear("bert.pooler.dense", width, width)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=pathlib.Path, help="the folder to write")
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = config(arguments.size)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(tensors(settings, arguments.seed), arguments.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
