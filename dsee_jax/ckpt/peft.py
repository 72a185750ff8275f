"""The files of an adapter in PEFT's layout, read as they are: names of modules, orientation (out, in), one scale per module.

::

    adapter_config.json         peft_type LORA or SUPERTUNING, r, lora_alpha, modules_to_save ...
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in), lora_B.weight (out, r)
                                base_model.model.<module>.supertuning_values (n,), supertuning_indices (n,), and
                                supertuning_lora_A.weight, supertuning_lora_B.weight as above
                                base_model.model.<name>: a tensor of a module that was trained whole

`dsee_jax.ckpt.peft_paths` finds the kernels of a model for the modules; `merge` folds the updates into tensors.
"""

import re
from collections.abc import Collection, Mapping
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from dsee_jax.ckpt import tensors
from dsee_jax.ckpt.folders import ADAPTER_CONFIG, PEFT_WEIGHTS, read_json
from dsee_jax.errors import InputError

PREFIX = "base_model.model."
"""The beginning of every name in the file of an adapter."""

PICKLE = "adapter_model.bin"
"""The weights of an adapter of earlier versions of PEFT, which are not read."""

LORA, SUPERTUNING = "LORA", "SUPERTUNING"
SUPPORTED = f"{LORA} (rank_pattern, alpha_pattern, use_rslora, fan_in_fan_out, modules_to_save) and {SUPERTUNING}"
"""The adapters that are read, for messages."""

SECONDS = 5.0
"""The time that a pattern of an adapter may take for one module."""

_PART = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora|lora_embedding|supertuning_lora|supertuning)_(?P<part>A|B|values|indices)"
    r"(?:\.default)?(?:\.weight)?"  # a state dict that no PEFT wrote has the name of the adapter, "default", too
)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_REFUSED = (
    *("use_dora", "lora_bias", "layer_replication", "target_parameters", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("megatron_config",),
)
"""Settings under which the model is not ``W + scale * B A``."""

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Prefixes of ``init_lora_weights`` under which PEFT changes the base too: the adapter alone does not give the model."""


class Update(NamedTuple):
    """The update of one module, ``scale * b @ a`` plus ``values`` at ``indices``; a part that it lacks has no entries."""

    a: np.ndarray  # (rank, in)
    b: np.ndarray  # (out, rank)
    scale: float  # of b @ a; the values have no scale
    indices: np.ndarray  # int64 (n,), ascending: positions in the weight (out, in), row by row
    values: np.ndarray  # float32 (n,)
    embedding: bool  # of the table of an embedding, stored (in, out)


class Peft(NamedTuple):
    """An adapter as its files have it, by the names of modules and tensors in the base."""

    folder: Path
    settings: dict[str, Any]  # adapter_config.json
    updates: dict[str, Update]
    tokens: dict[str, np.ndarray]  # trained rows of a module, float32
    saved: dict[str, tensors.Stored]  # tensors of modules that were trained whole

    @property
    def file(self) -> Path:
        """The file of the tensors."""
        return self.folder / PEFT_WEIGHTS


def read(folder: Path) -> Peft:
    """Return the adapter in a folder that PEFT, or an export of this library, wrote.

    Raises:
      InputError: no adapter of PEFT, a type or a setting that is not supported, or a tensor that belongs to no update.
    """
    file, settings = folder / PEFT_WEIGHTS, read_json(folder / ADAPTER_CONFIG)
    if not file.exists():
        if (folder / PICKLE).exists():
            raise InputError(
                f"{folder / PICKLE} is a pickle, which can run code when opened, and is not read; expected {PEFT_WEIGHTS}: "
                "where peft is installed, load the adapter and save it again with save_pretrained"
            )
        raise InputError(f"{file} is missing: the adapter is not complete; save or download it again")
    _check_settings(folder / ADAPTER_CONFIG, settings)
    parts: dict[tuple[str, bool], dict[str, np.ndarray]] = {}
    tokens: dict[str, np.ndarray] = {}
    saved: dict[str, tensors.Stored] = {}
    for name, stored in tensors.contents(file).items():
        inner = name.removeprefix(PREFIX)
        match = _PART.fullmatch(inner)
        if not name.startswith(PREFIX) or (not match and re.search(r"\.(lora|supertuning)_", inner)):
            raise InputError(
                f"{file}: {name!r} is not part of a supported adapter: expected {PREFIX}*.lora_A.weight; "
                f"supported: {SUPPORTED}"
            )
        if match:
            key = match["module"], match["kind"] == "lora_embedding"
            parts.setdefault(key, {})[match["part"]] = tensors.read(stored)
        elif inner.endswith(_TOKENS):
            tokens[inner.removesuffix(_TOKENS)] = tensors.read(stored).astype(np.float32)
        else:
            saved[inner.replace(".base_layer.", ".")] = stored
    if not parts and not tokens and not saved:
        raise InputError(f"{file} holds no tensors: the adapter is not complete; save or download it again")
    if len({module for module, _ in parts}) < len(parts):
        raise InputError(f"{file} holds a linear and an embedding update of one module: save or download it again")
    updates = {
        module: _update(file, settings, module, arrays, embedding) for (module, embedding), arrays in parts.items()
    }
    return Peft(folder, settings, updates, tokens, saved)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind not in (LORA, SUPERTUNING):
        raise InputError(
            f"{path}: peft_type {kind!r} is not supported: merge it with peft first; supported: {SUPPORTED}"
        )
    initial = settings.get("init_lora_weights")
    changed = isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE)
    for name in [*filter(settings.get, _REFUSED), *(["init_lora_weights"] if changed else [])]:
        raise InputError(
            f"{path}: {name}: {settings[name]!r} is not supported: merge the adapter with peft first; supported: {SUPPORTED}"
        )


def _update(
    file: Path, settings: Mapping[str, Any], module: str, parts: Mapping[str, np.ndarray], embedding: bool
) -> Update:
    """Return the update of a module from its arrays in the file."""
    where, names = f"{file}: the update of {module!r}", parts.keys()
    a, b = (parts.get(part, np.zeros((0, 0))) for part in "AB")
    indices, values = parts.get("indices", np.zeros(0, np.int64)), parts.get("values", np.zeros(0))
    if (
        (settings["peft_type"] == LORA and names != {"A", "B"})
        or len(names & {"A", "B"}) == 1
        or a.ndim != 2
        or b.ndim != 2
    ):
        raise InputError(f"{where} is not a pair of matrices lora_A and lora_B: only these are supported")
    if len(names & {"values", "indices"}) == 1:
        absent = "indices" if "values" in names else "values"
        raise InputError(f"{where} lacks supertuning_{absent}: save it with save_precomputed_indices=True")
    if indices.ndim != 1 or values.shape != indices.shape or not np.issubdtype(indices.dtype, np.integer):
        raise InputError(
            f"{where} has values {values.shape} and {indices.dtype} indices {indices.shape}; expected (n,)"
        )
    if b.shape[1] != a.shape[0]:
        raise InputError(f"{where} is {b.shape} times {a.shape}, which cannot be multiplied: save or download it again")
    scale = _scale(file.parent / ADAPTER_CONFIG, settings, module, a.shape[0]) if "A" in names else 1.0
    order = np.argsort(indices, kind="stable")
    sparse = indices.astype(np.int64)[order], values.astype(np.float32)[order]
    return Update(a.astype(np.float32), b.astype(np.float32), scale, *sparse, embedding)


def _scale(path: Path, settings: Mapping[str, Any], module: str, rank: int) -> float:
    try:
        patterns = settings.get("alpha_pattern") or {}
        key = next((key for key in patterns if _matches(key, module, path)), None)
        alpha = float(settings["lora_alpha"] if key is None else patterns[key])
        return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, regex.error) as error:
        raise InputError(
            f"{path}: no scale for {module!r} from lora_alpha, alpha_pattern and a rank of {rank}: {error}"
        ) from None


def _matches(pattern: str, module: str, path: Path) -> bool:
    """Return whether a module has a pattern of PEFT at its end; raises `InputError` for one that takes too long."""
    return _full_match(rf"(?:.*\.)?(?:{pattern})", module, f"{path}: alpha_pattern {pattern[:80]!r}")


def _full_match(pattern: str, module: str, where: str) -> bool:
    try:
        return regex.fullmatch(pattern, module, timeout=SECONDS) is not None
    except TimeoutError:
        raise InputError(
            f"{where} takes more than {SECONDS:g} s on {module!r}: write the names of the modules"
        ) from None


def within(name: str, saved: Collection[str]) -> bool:
    """Return whether a tensor is in a module that PEFT saved whole: one whose path has such an end, also within a word."""
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts)) for module in saved)


def is_target(settings: Mapping[str, Any], module: str) -> bool:
    """Return whether the settings of an adapter say that a linear module has an update; False where they leave it open.

    ``target_modules`` is a list of the ends of names or one regular expression. A shorthand (``all-linear``, none) leaves the
    modules to the model, and ``layers_to_transform`` a part of them.
    """
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if targets in (None, "all-linear") or settings.get("layers_to_transform") is not None:
        return False
    if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in settings.get("modules_to_save") or ()):
        return False
    return _names(targets, module) and not (excluded and _names(excluded, module))


def _names(targets: str | Collection[str], module: str) -> bool:
    if isinstance(targets, str):
        try:
            return _full_match(targets, module, f"the pattern of modules {targets[:80]!r} in {ADAPTER_CONFIG}")
        except regex.error:
            return False  # the tensors of the file decide
    return any(f".{module}".endswith(f".{name}") for name in targets)
