"""Adapters in PEFT's format, as `dsee_jax.ckpt.peft` reads them: the updates and the task head, for a base that PEFT opens.

========================  ===================  =================================================================
updates                   layers               adapter
========================  ===================  =================================================================
low-rank                  any                  LORA
sparse, or both           linear               SUPERTUNING: values at positions, and low-rank factors beside them
sparse, or both           Conv1D (GPT-2)       LORA: each row, or column, with sparse values is one more rank
========================  ===================  =================================================================

Each is exact up to rounding. PEFT has one scale for low-rank factors, ``lora_alpha / r``, and none for sparse values, which
hold theirs. ``r`` is one number for all modules, as programs without ``rank_pattern`` need: smaller updates get zeros.
A weight that holds several kernels, such as ``c_attn``, has the updates of all of them in one: their ranks add up.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax import hf_layout, models, tree
from dsee_jax.ckpt import hf_names, tensors
from dsee_jax.ckpt.adapter import Saved
from dsee_jax.ckpt.folders import ADAPTER_CONFIG, PEFT_WEIGHTS
from dsee_jax.ckpt.peft import LORA, PREFIX, SUPERTUNING
from dsee_jax.deltas.adapter import Update
from dsee_jax.errors import InputError
from dsee_jax.hf_layout import Layout
from dsee_jax.models import hf_config
from dsee_jax.models.architecture import Model
from dsee_jax.runtime import files

_TASKS = {
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "causal-lm": "CAUSAL_LM",
    "features": "FEATURE_EXTRACTION",
}


class _Module(NamedTuple):
    """The update of one module, ``scale * b @ a`` plus ``values`` at ``(rows, columns)`` of the matrix (in, out)."""

    shape: tuple[int, int]  # (in, out)
    a: np.ndarray  # (rank, in)
    b: np.ndarray  # (out, rank)
    rows: np.ndarray  # int (n,), inputs
    columns: np.ndarray  # int (n,), outputs
    values: np.ndarray  # float32 (n,), scaled


def save(path: Path, model: Model, adapter: Saved, *, base: str) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, path)`` loads with equal logits.

    Args:
      path: the new folder; it appears when it is complete.
      model: the model of the adapter, from `load_pretrained`.
      adapter: the updates, and the head or other params that were trained whole.
      base: the folder or hub id of the weights that the updates are for, which the adapter names.

    Raises:
      InputError: the base has layers of different widths, so that no other program opens it, an update is of no kernel, or
        ``path`` exists and is not an empty folder.
    """
    if kinds := hf_config.kept_kinds(model.config):
        raise InputError(
            f"{base} has lost {' and '.join(kinds)}, and its config.json has no fields for what is left: PEFT opens no such "
            f"base; use --format {'compact' if 'hidden' in kinds else 'hf'}, which folds the updates in"
        )
    names = hf_names.names(model)
    modules = _modules(model, adapter, names)
    sparse, linear = any(module.values.size for module in modules.values()), _all_linear(adapter, names)
    if sparse and not linear:
        modules = {name: _as_ranks(module, adapter.config["scale"]) for name, module in modules.items()}
    rank = max(len(module.a) for module in modules.values())
    modules = {name: _of_rank(module, rank) for name, module in modules.items()}
    arrays: dict[str, np.ndarray] = {}
    for param, leaf in tree.flatten(adapter.params).items():
        name, layout = names[param]
        arrays[name] = hf_layout.to_hf([layout], [np.asarray(leaf)])
    settings: dict[str, Any] = {
        "task_type": _TASKS[model.task],
        "base_model_name_or_path": base,
        "target_modules": list(modules),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in arrays}),
        "inference_mode": True,
    }
    if sparse and linear:
        arrays |= _supertuning(modules, settings)
    else:
        arrays |= _factors(modules, "lora")
        settings |= {"peft_type": LORA, "bias": "none", "fan_in_fan_out": not linear}
    if rank:
        settings |= {"r": rank, "lora_alpha": adapter.config["scale"] * rank, "lora_dropout": 0.0}
    with files.folder(path) as staging:
        tensors.save(
            staging / PEFT_WEIGHTS, {PREFIX + name: leaf for name, leaf in arrays.items()}, metadata={"format": "pt"}
        )
        (staging / ADAPTER_CONFIG).write_text(files.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _all_linear(adapter: Saved, names: Mapping[str, tuple[str, Layout]]) -> bool:
    """Return whether all updated kernels are stored (out, in), as those of ``torch.nn.Linear``; Conv1D stores (in, out)."""
    return all(names[path][1].transposed for path in adapter.adapter.updates)


def _modules(model: Model, adapter: Saved, names: Mapping[str, tuple[str, Layout]]) -> dict[str, _Module]:
    """Return the updates by the names of their modules."""
    updates, shapes = adapter.adapter.updates, tree.flatten(models.shapes(model))
    grouped: dict[str, list[str]] = {}
    for path in updates:
        if not path.endswith("/kernel"):
            raise InputError(f"the update of {path!r} is of no linear layer, which PEFT needs: use --format hf")
        grouped.setdefault(names[path][0].removesuffix(".weight"), []).append(path)
    options = adapter.adapter
    sparse_scale = float(options.scale) if options.scale_sparse else 1.0
    return {
        module: _joined(
            [(updates[path], names[path][1], shapes[path].shape) for path in paths], np.float32(sparse_scale)
        )
        for module, paths in grouped.items()
    }


def _joined(kernels: Sequence[tuple[Update, Layout, tuple[int, ...]]], sparse_scale: np.float32) -> _Module:
    """Return the update of the module whose weight holds some kernels: (update, layout, shape (in, out)) of each."""
    _, layout, (inputs, width) = kernels[0]
    outputs = width * layout.parts
    a, b = np.zeros((0, inputs), np.float32), np.zeros((outputs, 0), np.float32)
    rows = columns = np.zeros(0, np.int64)
    values = np.zeros(0, np.float32)
    for update, layout, _ in kernels:
        own, delta = hf_layout.outputs(layout, outputs), update.delta
        if "a" in delta:
            block = np.zeros((outputs, delta["a"].shape[1]), np.float32)
            block[own] = np.asarray(delta["b"]).T
            a, b = np.concatenate([a, np.asarray(delta["a"], np.float32).T]), np.concatenate([b, block], axis=1)
        if update.support is not None:
            support = np.asarray(update.support)
            rows, columns = np.append(rows, support[:, 0]), np.append(columns, own[support[:, 1]])
            values = np.append(values, np.asarray(delta["values"], np.float32) * sparse_scale)
    return _Module((inputs, outputs), a, b, rows, columns, values)


def _as_ranks(module: _Module, scale: float) -> _Module:
    """Return an update without sparse values: each row, or column, that has some is one more rank; the fewer of the two."""
    (inputs, outputs), values = module.shape, module.values / np.float32(scale)
    by_row = np.unique(module.rows).size <= np.unique(module.columns).size
    picked, index = np.unique(module.rows if by_row else module.columns, return_inverse=True)
    a, b = np.zeros((picked.size, inputs), np.float32), np.zeros((outputs, picked.size), np.float32)
    if by_row:
        a[np.arange(picked.size), picked] = 1
        np.add.at(b, (module.columns, index), values)
    else:
        b[picked, np.arange(picked.size)] = 1
        np.add.at(a, (index, module.rows), values)
    none = np.zeros(0, np.int64)
    joined = np.concatenate([module.a, a]), np.concatenate([module.b, b], axis=1)
    return _Module(module.shape, *joined, none, none, values[:0])


def _of_rank(module: _Module, rank: int) -> _Module:
    """Return an update of a larger rank, by zeros."""
    more = rank - len(module.a)
    return module._replace(a=np.pad(module.a, [(0, more), (0, 0)]), b=np.pad(module.b, [(0, 0), (0, more)]))


def _factors(modules: Mapping[str, _Module], prefix: str) -> dict[str, np.ndarray]:
    return {
        f"{name}.{prefix}_{part}.weight": matrix
        for name, module in modules.items()
        for part, matrix in (("A", module.a), ("B", module.b))
    }


def _supertuning(modules: Mapping[str, _Module], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of an adapter with sparse values, and set its type and sparsity.

    PEFT takes one ``sparsity``, and ``int(entries * (1 - sparsity))`` values for a weight of so many entries: where this is
    more than a module has, zeros at other positions fill up.
    """
    sizes = {name: module.shape[0] * module.shape[1] for name, module in modules.items()}
    # Half an entry more, for the rounding of the product.
    share = max((max(module.values.size, 1) + 0.5) / sizes[name] for name, module in modules.items())
    settings |= {"peft_type": SUPERTUNING, "sparsity": max(1 - share, 0.0), "save_precomputed_indices": True}
    arrays = _factors(modules, "supertuning_lora") if any(module.a.size for module in modules.values()) else {}
    for name, module in modules.items():
        count = int(sizes[name] * (1 - settings["sparsity"]))
        indices = module.columns * module.shape[0] + module.rows
        unused = np.setdiff1d(np.arange(count), indices)[: count - indices.size]
        arrays[f"{name}.supertuning_indices"] = np.append(indices, unused).astype(np.int32)
        arrays[f"{name}.supertuning_values"] = np.pad(module.values, (0, unused.size))
    return arrays
