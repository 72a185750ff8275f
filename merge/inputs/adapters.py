"""Adapters as models: this library's and LoRA in PEFT's layout, folded into the base's tensors while they are read."""

import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from dsee_jax import hf_layout, tree
from dsee_jax.ckpt import adapter, tensors
from dsee_jax.ckpt.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MASKS, PEFT_WEIGHTS, read_json
from dsee_jax.errors import InputError, did_you_mean
from merge.inputs import lazy
from merge.inputs.lazy import FLOATS, Lazy

PEFT_PICKLE = "adapter_model.bin"

_PREFIX = "base_model.model."
_REFUSED = (
    *("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("megatron_config",),
)
"""PEFT settings under which the model is not ``W + scale * B A``."""

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Prefixes of ``init_lora_weights`` under which PEFT changes the base too: the adapter alone does not give the model."""


def adapted(folder: Path, config: Mapping[str, Any], base: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], list[Path]]:
    """Return the tensors of a base with an adapter folded in, and the files of the adapter.

    Args:
      folder: of the adapter.
      config: the base's config.json.
      base: its tensors.

    Raises:
      InputError: no adapter, a damaged or unsupported adapter, or an adapter of another model: every tensor of the adapter
        must match a tensor of the base.
    """
    if (folder / ADAPTER_WEIGHTS).exists():
        return _ours(folder, config, base)
    if (folder / PEFT_WEIGHTS).exists():
        return _peft(folder, base)
    if (folder / PEFT_PICKLE).exists():
        raise InputError(
            f"{folder / PEFT_PICKLE} is a pickle, which can run code when opened, and is not read; expected {PEFT_WEIGHTS}: "
            "where peft is installed, load the adapter and save it again with save_pretrained"
        )
    raise InputError(f"{folder} holds no adapter: expected {ADAPTER_WEIGHTS}, or {PEFT_WEIGHTS} as PEFT writes it")


def _ours(folder: Path, config: Mapping[str, Any], base: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], list[Path]]:
    from dsee_jax.ckpt import hf_names  # imports Flax and every architecture, which other merges do not need

    saved, file = adapter.load(folder), folder / ADAPTER_WEIGHTS
    supports, params, masks = tree.flatten(saved.supports), tree.flatten(saved.params), tree.flatten(saved.masks)
    updates: dict[str, dict[str, np.ndarray]] = {path: {} for path in [*masks, *supports]}
    for path, leaf in tree.flatten(saved.deltas).items():
        parent, _, part = path.rpartition("/")
        updates.setdefault(parent, {})[part] = np.asarray(leaf, np.float32)
    scale = float(saved.config["scale"])
    sparse = scale if saved.config["scale_sparse"] else 1.0
    places = hf_names.locations(config, [*updates, *params], base)
    adapted_tensors = dict(base)
    for path, leaf in params.items():
        name, (transposed, *_) = places[path]
        adapted_tensors[name] = lazy.from_array(leaf.T if transposed else leaf, file)
    for path, update in updates.items():
        name, layout = places[path]
        kernel = _matrix(adapted_tensors, name, f"{file}: the update of {path!r}")
        shape_in_out = kernel.shape[::-1] if layout.transposed else kernel.shape
        # This kernel's columns in a tensor that several kernels share; their updates are folded in one after the other.
        columns = hf_layout.outputs(layout, shape_in_out[1])
        shape = (shape_in_out[0], len(columns))
        support, mask = supports.get(path), masks.get(path)
        if not _fits(shape, update, support) or (mask is not None and mask.shape != shape):
            raise InputError(f"{file}: the update of {path!r} does not fit {shape}, the shape of its kernel")
        factors = None
        if "a" in update:
            left, right = update["a"] * np.float32(scale), np.zeros((len(update["b"]), shape_in_out[1]), np.float32)
            right[:, columns] = update["b"]
            factors = (right.T, left.T) if layout.transposed else (left, right)
        scattered = None
        if support is not None:
            row, column = support[:, 0].astype(np.int64), columns[support[:, 1]]
            flat = column * shape_in_out[0] + row if layout.transposed else row * shape_in_out[1] + column
            order = np.argsort(flat, kind="stable")
            scattered = flat[order], update["values"][order] * np.float32(sparse)
        bits = None
        if mask is not None:
            full_mask = np.ones(shape_in_out, bool)
            full_mask[:, columns] = mask
            bits = np.packbits(full_mask.T if layout.transposed else full_mask)
        adapted_tensors[name] = lazy.adapted(kernel, file, factors=factors, sparse=scattered, kept=bits)
    mask_files = [folder / MASKS] if masks else []
    return adapted_tensors, [folder / ADAPTER_CONFIG, file, *mask_files]


def _fits(shape: tuple[int, ...], update: Mapping[str, np.ndarray], support: np.ndarray | None) -> bool:
    """Return whether an update is complete and fits a kernel of ``shape`` (in, out)."""
    shapes = {part: leaf.shape for part, leaf in update.items()}
    low, values = {part: size for part, size in shapes.items() if part != "values"}, shapes.get("values")
    if low:
        rank = low.get("b", (0,))[:1]
        if low != {"a": (*shape[:1], *rank), "b": (*rank, *shape[1:])}:
            return False
    if values is None or support is None:
        return values is None and support is None
    valid = support.shape == (*values, 2) and bool(np.all((support >= 0) & (support < shape)))
    return len(values) == 1 and valid


def _peft(folder: Path, base: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], list[Path]]:
    file, settings = folder / PEFT_WEIGHTS, read_json(folder / ADAPTER_CONFIG)
    _supported(folder / ADAPTER_CONFIG, settings)
    saved = settings.get("modules_to_save") or ()
    adapted_tensors, pairs = dict(base), {}
    for name, stored in tensors.contents(file).items():
        inner = name.removeprefix(_PREFIX)
        pair = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", inner)
        if not name.startswith(_PREFIX) or (not pair and ".lora_" in inner):
            raise InputError(f"{file}: {name!r} is not part of a supported LoRA: expected {_PREFIX}*.lora_A.weight")
        if pair:
            pairs.setdefault((pair[1], bool(pair[2])), {})[pair[3]] = tensors.read(stored).astype(np.float32)
            continue
        inner = inner.replace(".base_layer.", ".")
        replaced = any(f".{module}." in f".{inner}" for module in saved)
        adapted_tensors[inner if replaced else _name(inner, base, f"{file}: {name!r}")] = lazy.plain(stored)
    for (module, embedding), parts in pairs.items():
        where = f"{file}: the update of {module!r}"
        if parts.keys() != {"A", "B"} or any(part.ndim != 2 for part in parts.values()):
            raise InputError(f"{where} is not a pair of matrices lora_A and lora_B: only these are supported")
        name = _name(f"{module}.weight", base, where)
        kernel = _matrix(adapted_tensors, name, where)
        left, right = parts["B"], parts["A"]
        if embedding or settings.get("fan_in_fan_out"):
            left, right = right.T, left.T
        if left.shape[1] != right.shape[0] or (left.shape[0], right.shape[1]) != kernel.shape:
            raise InputError(f"{where} is {left.shape} times {right.shape}; {name!r} of the base is {kernel.shape}")
        scale = _scale(settings, module, left.shape[1], folder / ADAPTER_CONFIG)
        adapted_tensors[name] = lazy.adapted(kernel, file, factors=(left * np.float32(scale), right))
    return adapted_tensors, [folder / ADAPTER_CONFIG, file]


def _supported(path: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type {kind!r} is not supported; expected 'LORA': merge it with peft first")
    initial = settings.get("init_lora_weights")
    changed = isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE)
    for name in [*filter(settings.get, _REFUSED), *(["init_lora_weights"] if changed else [])]:
        raise InputError(f"{path}: {name}: {settings[name]!r} is not supported: merge the adapter with peft first")


def _scale(settings: Mapping[str, Any], module: str, rank: int, path: Path) -> float:
    try:
        patterns = settings.get("alpha_pattern") or {}
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = float(settings["lora_alpha"] if key is None else patterns[key])
        return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise InputError(
            f"{path}: no scale for {module!r} from lora_alpha, alpha_pattern and a rank of {rank}: {error}"
        ) from None


def _name(name: str, base: Mapping[str, Lazy], where: str) -> str:
    """Return the base's name for a tensor; either name may lack the model's prefix of the other."""
    if name in base:
        return name
    near = [other for other in base if name.endswith(f".{other}") or other.endswith(f".{name}")]
    if len(near) != 1:
        raise InputError(
            f"{where}: the base has no tensor {name!r}{did_you_mean(name, base)}; is it the adapter's base?"
        )
    return near[0]


def _matrix(base: Mapping[str, Lazy], name: str, where: str) -> Lazy:
    if name not in base:
        raise InputError(
            f"{where}: the base has no tensor {name!r}{did_you_mean(name, base)}; is it the adapter's base?"
        )
    kernel = base[name]
    if len(kernel.shape) != 2 or kernel.dtype not in FLOATS:
        raise InputError(f"{where}: {name!r} of the base is {kernel.dtype} {kernel.shape}; expected a matrix of floats")
    return kernel
