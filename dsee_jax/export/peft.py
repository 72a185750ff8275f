"""Adapters in the layout of PEFT: low-rank factors and the task head, which PEFT puts on the base they were tuned from.

::

    adapter_config.json         peft_type LORA, r, lora_alpha, the modules by their full names
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in), lora_B.weight (out, r), and the head's tensors
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dsee_jax import tree
from dsee_jax.ckpt import folders, hf_names
from dsee_jax.ckpt.adapter import Adapter
from dsee_jax.deltas import fold
from dsee_jax.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TASKS = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def save(path: Path, model: Any, adapter: Adapter) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, path)`` opens with equal logits.

    Args:
      path: the folder to make; whole or not there.
      model: what the adapter was tuned on, as from `load_pretrained`.
      adapter: low-rank factors on the pretrained weights, and the head.

    Raises:
      InputError: the adapter is more than that (sparse values, masks, a cut model), so that PEFT could not give its logits,
        or ``path`` exists and is not an empty folder.
    """
    config = adapter.config
    if adapter.supports:
        raise InputError("PEFT's LoRA has no sparse values and this adapter has (delta.nonzeros): use --format hf")
    if adapter.masks or adapter.kept or "kept" in config:
        raise InputError("PEFT puts an adapter on the pretrained weights and this run has pruned them: use --format hf")
    factors, head = fold.kernels(adapter.deltas), tree.flatten(adapter.params)
    names = hf_names.names(model)
    places = {path: names[path] for path in [*factors, *head]}
    for place, (name, layout) in places.items():
        if layout.parts > 1:
            raise InputError(f"{place!r} is a part of {name!r}, which PEFT updates as a whole: use --format hf")
    modules = {path: name.rpartition(".")[0] for path, (name, _) in places.items()}
    written = {f"{modules[path]}.lora_A.weight": delta["a"].T for path, delta in factors.items()}
    written |= {f"{modules[path]}.lora_B.weight": delta["b"].T for path, delta in factors.items()}
    written |= {places[path][0]: leaf.T if places[path][1].transposed else leaf for path, leaf in head.items()}
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
        "fan_in_fan_out": not all(places[path][1].transposed for path in factors),
        "inference_mode": True,
    }
    with folders.whole(path) as staging:
        # safetensors writes the memory of a strided view as it lies, in the wrong order.
        arrays = {_PREFIX + name: np.ascontiguousarray(leaf) for name, leaf in written.items()}
        save_file(arrays, staging / WEIGHTS, metadata={"format": "pt"})
        (staging / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
