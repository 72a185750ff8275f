"""Tiny checkpoints on disk, and merge recipes."""

import json

import numpy as np
import yaml

from dsee_jax.ckpt import tensors

CONFIG = {
    "architectures": ["TinyForCausalLM"],
    "model_type": "tiny",
    "num_hidden_layers": 3,
    "vocab_size": 50,
    "hidden_size": 16,
    "tie_word_embeddings": False,
}


def shapes(layers=3, width=16, vocabulary=50):
    """Yield the names and shapes of the tensors of a decoder."""
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(layers):
        yield f"model.layers.{layer}.attn.weight", (width, width)
        yield f"model.layers.{layer}.mlp.weight", (2 * width, width)
        yield f"model.layers.{layer}.norm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def family(folder, *, models=2, dtype="float32", config=CONFIG, max_shard_size="5GB", **size):
    """Write the models ``base``, ``model_0`` ... in ``folder``; return their arrays, ``[base, model_0, ...]``."""
    generator = np.random.default_rng(0)
    base = {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes(**size)}
    trees = [base] + [
        {name: (b + 0.05 * generator.normal(size=b.shape) * (number + 1)).astype(dtype) for name, b in base.items()}
        for number in range(models)
    ]
    for name, tree in zip(["base", *(f"model_{number}" for number in range(models))], trees, strict=True):
        save(folder / name, tree, config, max_shard_size)
    return trees


def save(folder, tree, config=CONFIG, max_shard_size="5GB"):
    """Write one checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors.write(folder, tree, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(config))


def recipe(folder, method="linear", *, models=2, base=None, parameters=None, each=None, **keys):
    """Write a recipe over a `family`; return the path."""
    fields = {
        "merge_method": method,
        "models": [{"model": f"model_{number}", "parameters": dict(each or {})} for number in range(models)],
        **({"base_model": "base"} if (base if base is not None else method != "linear") else {}),
        **({"parameters": parameters} if parameters else {}),
        **keys,
    }
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(fields))
    return path


def load(folder):
    """Read all tensors of a folder."""
    return {name: tensors.read(stored) for name, stored in tensors.index(folder).items()}
