"""Adapters in PEFT's format: the low-rank factors and the task head, for the pretrained base model.

::

    adapter_config.json         peft_type LORA, r, lora_alpha, full module names
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in), lora_B.weight (out, r), and the head's tensors
"""

from pathlib import Path

from dsee_jax import tree
from dsee_jax.ckpt import hf_names, tensors
from dsee_jax.ckpt.adapter import Saved
from dsee_jax.ckpt.folders import ADAPTER_CONFIG, PEFT_WEIGHTS
from dsee_jax.deltas.adapter import kernels
from dsee_jax.errors import InputError
from dsee_jax.models.architecture import Model
from dsee_jax.runtime import files

_PREFIX = "base_model.model."
_TASKS = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def save(path: Path, model: Model, adapter: Saved) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, path)`` loads with equal logits.

    Args:
      path: the new folder; it appears when it is complete.
      model: the model of the adapter, from `load_pretrained`.
      adapter: low-rank factors for the pretrained weights, and the head.

    Raises:
      InputError: PEFT cannot represent the adapter (sparse values, masks, a structurally pruned model, part of a fused
        weight), or ``path`` exists and is not an empty folder.
    """
    config = adapter.config
    if adapter.supports:
        raise InputError("PEFT has no sparse values, but this adapter has (delta.nonzeros): use --format hf")
    if adapter.masks or adapter.kept or "kept" in config:
        raise InputError("PEFT needs the pretrained weights, but this run has pruned them: use --format hf")
    factors, head = kernels(adapter.deltas), tree.flatten(adapter.params)
    table = hf_names.names(model)
    names = {path: table[path] for path in [*factors, *head]}
    for leaf_path, (name, layout) in names.items():
        if layout.parts > 1:
            raise InputError(
                f"{leaf_path!r} is one part of {name!r}, which PEFT can only update as one: use --format hf"
            )
    modules = {path: name.rpartition(".")[0] for path, (name, _) in names.items()}
    leaves = {f"{modules[path]}.lora_A.weight": delta["a"].T for path, delta in factors.items()}
    leaves |= {f"{modules[path]}.lora_B.weight": delta["b"].T for path, delta in factors.items()}
    leaves |= {names[path][0]: leaf.T if names[path][1].transposed else leaf for path, leaf in head.items()}
    settings = {
        "peft_type": "LORA",
        "task_type": _TASKS[model.task],
        "base_model_name_or_path": config["base"],
        "r": config["delta"]["rank"],
        "lora_alpha": config["scale"] * config["delta"]["rank"],
        "target_modules": [modules[path] for path in factors],
        "modules_to_save": sorted({modules[path] for path in head}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not all(names[path][1].transposed for path in factors),
        "inference_mode": True,
    }
    with files.folder(path) as staging:
        arrays = {_PREFIX + name: leaf for name, leaf in leaves.items()}
        tensors.save(staging / PEFT_WEIGHTS, arrays, metadata={"format": "pt"})
        (staging / ADAPTER_CONFIG).write_text(files.dumps(settings, indent=2) + "\n", encoding="utf-8")
