"""Adapters as models: this library's and LoRA in PEFT's layout, folded into the tensors of the base as these are read."""

import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from dsee_jax import hf_layout, tree
from dsee_jax.ckpt import adapter, tensors
from dsee_jax.ckpt.folders import read_json
from dsee_jax.errors import InputError, did_you_mean
from merge.inputs import lazy
from merge.inputs.lazy import FLOATS, Lazy

PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"

_PREFIX = "base_model.model."
_REFUSED = (
    *("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("megatron_config",),
)
"""PEFT settings with which an adapter is not ``W + scale * B A``."""

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Prefixes of ``init_lora_weights`` with which PEFT changes the base too: the update alone is not the fine-tuned model."""


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
    if (folder / adapter.WEIGHTS).exists():
        return _ours(folder, config, base)
    if (folder / PEFT_WEIGHTS).exists():
        return _peft(folder, base)
    if (folder / PEFT_PICKLE).exists():
        raise InputError(
            f"{folder / PEFT_PICKLE} is a pickle, which can run code when opened, and is not read; expected {PEFT_WEIGHTS}: "
            "where peft is installed, load the adapter and save it again with save_pretrained"
        )
    raise InputError(f"{folder} holds no adapter: expected {adapter.WEIGHTS}, or {PEFT_WEIGHTS} as PEFT writes it")


def _ours(folder: Path, config: Mapping[str, Any], base: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], list[Path]]:
    from dsee_jax.ckpt import hf_names  # imports Flax and every architecture, which no other merge needs

    saved, file = adapter.load(folder), folder / adapter.WEIGHTS
    supports, params, masks = tree.flatten(saved.supports), tree.flatten(saved.params), tree.flatten(saved.masks)
    updates: dict[str, dict[str, np.ndarray]] = {path: {} for path in [*masks, *supports]}
    for path, leaf in tree.flatten(saved.deltas).items():
        parent, _, part = path.rpartition("/")
        updates.setdefault(parent, {})[part] = np.asarray(leaf, np.float32)
    try:
        scale = float(saved.config["scale"])
        sparse = scale if saved.config["scale_sparse"] else 1.0
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / adapter.CONFIG} lacks 'scale' or 'scale_sparse': save the adapter again") from None
    places = hf_names.locations(config, [*updates, *params], base)
    adapted_tensors = dict(base)
    for path, leaf in params.items():
        name, (transposed, *_) = places[path]
        adapted_tensors[name] = lazy.from_array(leaf.T if transposed else leaf, file)
    for path, update in updates.items():
        name, layout = places[path]
        kernel = _matrix(adapted_tensors, name, f"{file}: the update of {path!r}")
        whole = kernel.shape[::-1] if layout.transposed else kernel.shape
        # The columns of this kernel in a tensor that several kernels share; each update is folded in on top of the last.
        columns = hf_layout.outputs(layout, whole[1])
        shape = (whole[0], len(columns))
        support, mask = supports.get(path), masks.get(path)
        if not _fits(shape, update, support) or (mask is not None and mask.shape != shape):
            raise InputError(f"{file}: the update of {path!r} does not fit {shape}, the shape of its kernel")
        factors = None
        if "a" in update:
            left, right = update["a"] * np.float32(scale), np.zeros((len(update["b"]), whole[1]), np.float32)
            right[:, columns] = update["b"]
            factors = (right.T, left.T) if layout.transposed else (left, right)
        spread = None
        if support is not None:
            row, column = support[:, 0].astype(np.int64), columns[support[:, 1]]
            flat = column * whole[0] + row if layout.transposed else row * whole[1] + column
            order = np.argsort(flat, kind="stable")
            spread = flat[order], update["values"][order] * np.float32(sparse)
        bits = None
        if mask is not None:
            kept_whole = np.ones(whole, bool)
            kept_whole[:, columns] = mask
            bits = np.packbits(kept_whole.T if layout.transposed else kept_whole)
        adapted_tensors[name] = lazy.adapted(kernel, file, factors=factors, sparse=spread, kept=bits)
    also = [folder / adapter.MASKS] if masks else []
    return adapted_tensors, [folder / adapter.CONFIG, file, *also]


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
    inside = support.shape == (*values, 2) and bool(np.all((support >= 0) & (support < shape)))
    return len(values) == 1 and inside


def _peft(folder: Path, base: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], list[Path]]:
    file, settings = folder / PEFT_WEIGHTS, read_json(folder / PEFT_CONFIG)
    _supported(folder / PEFT_CONFIG, settings)
    saved = settings.get("modules_to_save") or ()
    adapted_tensors, pairs = dict(base), {}
    for name, stored in tensors.contents(file).items():
        inner = name.removeprefix(_PREFIX)
        pair = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", inner)
        if not name.startswith(_PREFIX) or (not pair and ".lora_" in inner):
            raise InputError(
                f"{file}: {name!r} is no part of a LoRA that is supported: expected {_PREFIX}*.lora_A.weight"
            )
        if pair:
            pairs.setdefault((pair[1], bool(pair[2])), {})[pair[3]] = tensors.read(stored).astype(np.float32)
            continue
        inner = inner.replace(".base_layer.", ".")
        whole = any(f".{module}." in f".{inner}" for module in saved)
        adapted_tensors[inner if whole else _name(inner, base, f"{file}: {name!r}")] = lazy.plain(stored)
    for (module, embedding), parts in pairs.items():
        what = f"{file}: the update of {module!r}"
        if parts.keys() != {"A", "B"} or any(part.ndim != 2 for part in parts.values()):
            raise InputError(f"{what} is not a pair of matrices lora_A and lora_B: only these are supported")
        name = _name(f"{module}.weight", base, what)
        kernel = _matrix(adapted_tensors, name, what)
        left, right = parts["B"], parts["A"]
        if embedding or settings.get("fan_in_fan_out"):
            left, right = right.T, left.T
        if left.shape[1] != right.shape[0] or (left.shape[0], right.shape[1]) != kernel.shape:
            raise InputError(f"{what} is {left.shape} times {right.shape}; {name!r} of the base is {kernel.shape}")
        scale = _scale(settings, module, left.shape[1], folder / PEFT_CONFIG)
        adapted_tensors[name] = lazy.adapted(kernel, file, factors=(left * np.float32(scale), right))
    return adapted_tensors, [folder / PEFT_CONFIG, file]


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


def _name(name: str, base: Mapping[str, Lazy], what: str) -> str:
    """Return the base's name for a tensor; either name may lack the model's prefix of the other."""
    if name in base:
        return name
    near = [other for other in base if name.endswith(f".{other}") or other.endswith(f".{name}")]
    if len(near) != 1:
        raise InputError(
            f"{what}: the base has no tensor {name!r}{did_you_mean(name, base)}; is it the adapter's base?"
        )
    return near[0]


def _matrix(base: Mapping[str, Lazy], name: str, what: str) -> Lazy:
    if name not in base:
        raise InputError(
            f"{what}: the base has no tensor {name!r}{did_you_mean(name, base)}; is it the adapter's base?"
        )
    kernel = base[name]
    if len(kernel.shape) != 2 or kernel.dtype not in FLOATS:
        raise InputError(f"{what}: {name!r} of the base is {kernel.dtype} {kernel.shape}; expected a matrix of floats")
    return kernel
