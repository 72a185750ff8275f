"""The checkpoints of the merges: a Llama of random weights and two models tuned from it, in three shards each.

python -m benchmarks.peers.checkpoints FOLDER SHAPE
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

MODELS = ("base", "model_a", "model_b")
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "1.1b": (22, 2048, 5632, 32000, 32, 4),
    "4.5b": (29, 3584, 9856, 64000, 32, 8),
    "tiny": (2, 64, 176, 512, 4, 2),
}
"""Name -> layers, width, feed-forward width, vocabulary, heads, heads of keys and values."""


def config(name: str) -> dict[str, Any]:
    """Return the content of config.json."""
    layers, width, hidden, vocabulary, heads, kv_heads = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model by its name."""
    layers, width, hidden, vocabulary, heads, kv_heads = SHAPES[name]
    inner = width // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        shapes |= {
            f"{stem}.input_layernorm.weight": (width,),
            f"{stem}.self_attn.q_proj.weight": (width, width),
            f"{stem}.self_attn.k_proj.weight": (inner, width),
            f"{stem}.self_attn.v_proj.weight": (inner, width),
            f"{stem}.self_attn.o_proj.weight": (width, width),
            f"{stem}.post_attention_layernorm.weight": (width,),
            f"{stem}.mlp.gate_proj.weight": (hidden, width),
            f"{stem}.mlp.up_proj.weight": (hidden, width),
            f"{stem}.mlp.down_proj.weight": (width, hidden),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def write(folder: Path, name: str) -> None:
    """Write the models; those that exist stay."""
    import ml_dtypes
    import numpy as np

    from dsee_jax.ckpt import tensors as files
    from dsee_jax.runtime import atomic

    def normal(seed: list[int], shape: tuple[int, ...]) -> np.ndarray:
        # A large tensor repeats its numbers: drawing every number would take longer than all merges.
        return np.resize(np.random.default_rng(seed).standard_normal(1 << 22, np.float32), shape)

    def weights(tensor: str, model: int) -> np.ndarray:
        seed, shape = [ord(letter) for letter in tensor], shapes[tensor]
        drawn = normal(seed, shape) * np.float32(0.02)
        if model:
            # Changes by tuning are small against the weights and differ between layers.
            scale = np.random.default_rng([*seed, model]).uniform(0.5, 2)
            drawn += normal([*seed, model], shape) * np.float32(2e-4 * scale)
        return drawn.astype(ml_dtypes.bfloat16)

    shapes = tensors(name)
    kinds = {tensor: ("BF16", shape) for tensor, shape in shapes.items()}
    size = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    for number, model in enumerate(MODELS):
        if (folder / model).exists():
            continue
        with atomic.folder(folder / model) as partial:
            files.write_each(
                partial, kinds, lambda tensor, number=number: weights(tensor, number), max_shard_size=size * 2 // 5
            )
            (partial / "config.json").write_text(json.dumps(config(name), indent=1))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    write(Path(sys.argv[1]), sys.argv[2])
