"""LoRA adapters in PEFT's layout, without torch and without the code under test."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file


def pairs(shapes: Mapping[str, tuple[int, int]], *, rank: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random lora_A (rank, in) and lora_B (out, rank) by their names, for modules with weights (out, in)."""
    noise, arrays = np.random.default_rng(seed), {}
    for module, (outputs, inputs) in shapes.items():
        arrays[f"{module}.lora_A.weight"] = noise.normal(0, 0.3, (rank, inputs)).astype(np.float32)
        arrays[f"{module}.lora_B.weight"] = noise.normal(0, 0.3, (outputs, rank)).astype(np.float32)
    return arrays


def write(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], **settings) -> pathlib.Path:
    """Write the folder of an adapter with ``r`` 2 and ``lora_alpha`` 6, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 6} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefixed = {f"base_model.model.{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    return folder
