"""DSEE in JAX: tune pretrained transformers by low-rank + sparse updates, and prune them to sparse or smaller models.

::

    model, params = dsee_jax.load_pretrained(path, num_labels=2)
    adapter = dsee_jax.deltas.init(params, dsee_jax.DeltaConfig(rank=16, nonzeros=64), key=jax.random.key(0))
    logits = dsee_jax.apply(model, params, adapter, batch)
    masks = dsee_jax.prune.unstructured(params, adapter, [("encoder/.*/kernel", True)], sparsity=0.5)
    masks = dsee_jax.prune.structured(params, adapter, dsee_jax.models.cuts(model), heads=0.25, neurons=0.4)
    small_model, small_params = dsee_jax.compact(model, params, masks)

    model, params = dsee_jax.load_pretrained(path, task="causal-lm")
    tokens = dsee_jax.generate(model, params, input_ids, attention_mask, new_tokens=64)

    results = dsee_jax.run(dsee_jax.Config(output_dir="runs/demo"))
    dsee_jax.export_run("runs/demo", "exported", form="hf")
"""

from typing import TYPE_CHECKING

from dsee_jax.lazy import package

if TYPE_CHECKING:
    from dsee_jax import deltas, generation, masks, models, nnx, prune, tree
    from dsee_jax.ckpt.adapted import load_adapter
    from dsee_jax.ckpt.hf import load_pretrained
    from dsee_jax.ckpt.hf_save import save_pretrained
    from dsee_jax.ckpt.tokenizer import load_tokenizer
    from dsee_jax.config import (
        Config,
        DataConfig,
        DeltaConfig,
        DistillConfig,
        GenerateConfig,
        MeshConfig,
        ModelConfig,
        PruneConfig,
        RatesConfig,
        TargetConfig,
        TrainConfig,
    )
    from dsee_jax.deltas import decompose
    from dsee_jax.deltas.adapter import Adapter
    from dsee_jax.deltas.attach import apply, attached
    from dsee_jax.deltas.fold import materialize
    from dsee_jax.errors import InputError
    from dsee_jax.export.run import export_run
    from dsee_jax.generation.decoding import generate
    from dsee_jax.prune.compaction import compact
    from dsee_jax.train.loop import run

__all__ = [
    "Adapter",
    "Config",
    "DataConfig",
    "DeltaConfig",
    "DistillConfig",
    "GenerateConfig",
    "InputError",
    "MeshConfig",
    "ModelConfig",
    "PruneConfig",
    "RatesConfig",
    "TargetConfig",
    "TrainConfig",
    "apply",
    "attached",
    "compact",
    "decompose",
    "deltas",
    "export_run",
    "generate",
    "generation",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "masks",
    "materialize",
    "models",
    "nnx",
    "prune",
    "run",
    "save_pretrained",
    "tree",
]

_PUBLIC = {
    "load_adapter": "ckpt.adapted",
    "load_pretrained": "ckpt.hf",
    "save_pretrained": "ckpt.hf_save",
    "load_tokenizer": "ckpt.tokenizer",
    "Config": "config",
    "DataConfig": "config",
    "DeltaConfig": "config",
    "DistillConfig": "config",
    "GenerateConfig": "config",
    "MeshConfig": "config",
    "ModelConfig": "config",
    "PruneConfig": "config",
    "TargetConfig": "config",
    "RatesConfig": "config",
    "TrainConfig": "config",
    "decompose": "deltas",
    "Adapter": "deltas.adapter",
    "apply": "deltas.attach",
    "attached": "deltas.attach",
    "materialize": "deltas.fold",
    "InputError": "errors",
    "export_run": "export.run",
    "generate": "generation.decoding",
    "compact": "prune.compaction",
    "run": "train.loop",
}
"""The submodule that defines each public name."""

if not TYPE_CHECKING:  # a type checker reads the imports above, and reports other names
    __getattr__, __dir__ = package(__name__, _PUBLIC)
