"""An adapter of PEFT at the paths of a model: kernels (in, out), one scale for all updates.

PEFT has a scale for each module, an `Adapter` of this library has one: the scale of most modules. Where a module has another,
``b`` is multiplied by the quotient, so that ``scale * a @ b`` is the same up to rounding. A tensor that holds several kernels,
such as ``c_attn`` of GPT-2, has one ``a``; each of its kernels gets a copy and its own columns of ``b``.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from dsee_jax import hf_layout, models, tree
from dsee_jax.ckpt import adapter, hf_names, tensors
from dsee_jax.ckpt.folders import ADAPTER_CONFIG
from dsee_jax.ckpt.peft import Peft, Update, is_target
from dsee_jax.errors import InputError
from dsee_jax.hf_layout import Layout
from dsee_jax.models.architecture import Model, scans

_SHOWN = 3
"""The most names that a message lists."""


class _Kernel(NamedTuple):
    """A kernel of the model in a weight of the base."""

    path: str
    shape: tuple[int, ...]  # (in, out)
    layout: Layout


def to_saved(peft: Peft, model: Model, base: str) -> adapter.Saved:
    """Return an adapter of PEFT as an adapter of this library, with separate layers.

    Args:
      peft: as from `dsee_jax.ckpt.peft.read`.
      model: the base.
      base: the name of the base, for messages.

    Raises:
      InputError: the adapter changes more than linear layers and whole modules, belongs to another base, or is not complete.
    """
    _check_settings(peft)
    model = model.clone(scan=False) if scans(model) else model
    kernels, params = _by_name(model)
    updates = {module: (update, _lookup(kernels, model, module)) for module, update in peft.updates.items()}
    saved = {name: (stored, _lookup(params, model, name)) for name, stored in peft.saved.items()}
    _check_base(peft, base, updates, saved)
    _check_complete(peft, kernels, {kernel.path for _, places in updates.values() for kernel in places})
    # Above 0, as an adapter of this library has it: b gets the sign, and zeros where PEFT's scale is 0.
    scale = Counter(abs(each.scale) for each, _ in updates.values() if each.a.size and each.scale).most_common(1)
    common = scale[0][0] if scale else 1.0
    deltas: dict[str, np.ndarray] = {}
    supports: dict[str, np.ndarray] = {}
    for update, places in updates.values():
        for kernel in places:
            delta, support = _at_kernel(update, kernel, common)
            deltas |= {f"{kernel.path}/{part}": array for part, array in delta.items()}
            supports |= {kernel.path: support} if "values" in delta else {}
    heads: dict[str, np.ndarray] = {}
    for stored, places in saved.values():
        array = tensors.read(stored).astype(np.float32)
        heads |= {kernel.path: np.ascontiguousarray(hf_layout.to_ours(kernel.layout, array)) for kernel in places}
    for path, array in {**deltas, **heads}.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"{peft.file}: {path!r} gets NaN or infinities: the adapter is damaged, or of a diverged run"
            )
    config = {"scale": common, "scale_sparse": False, "base": peft.settings.get("base_model_name_or_path")}
    return adapter.Saved(tree.unflatten(deltas), tree.unflatten(supports), tree.unflatten(heads), {}, config, {})


def _check_settings(peft: Peft) -> None:
    path, bias = peft.folder / ADAPTER_CONFIG, peft.settings.get("bias") or "none"
    fix = "fold it into its base first (a merge recipe with merge_method: passthrough), and give that model"
    if bias != "none":
        raise InputError(f"{path}: bias is {bias!r}, which trains biases; supported: 'none': {fix}")
    if peft.tokens:
        raise InputError(f"{path}: trainable_token_indices, trained rows of an embedding, is not supported: {fix}")
    if module := next((module for module, update in peft.updates.items() if update.embedding), None):
        raise InputError(f"{path}: target_modules holds the embedding {module!r}; supported: linear layers: {fix}")


def _by_name(model: Model) -> tuple[dict[str, list[_Kernel]], dict[str, list[_Kernel]]]:
    """Return the kernels of a model by the names of their modules, and all params by the names of their tensors."""
    shapes = {path: leaf.shape for path, leaf in tree.flatten(models.shapes(model)).items()}
    modules: dict[str, list[_Kernel]] = {}
    params: dict[str, list[_Kernel]] = {}
    for path, (name, layout) in hf_names.names(model).items():
        params.setdefault(name, []).append(kernel := _Kernel(path, shapes[path], layout))
        if path.endswith("/kernel"):
            modules.setdefault(name.removesuffix(".weight"), []).append(kernel)
    return modules, params


def _lookup(table: Mapping[str, list[_Kernel]], model: Model, name: str) -> list[_Kernel]:
    """Return the params under a name, which may lack the prefix of the architecture, or have it alone; [] for none."""
    prefix = models.find(model.config.model_type).prefix
    return table.get(name) or table.get(prefix + name) or table.get(name.removeprefix(prefix)) or []


def _weight(kernels: list[_Kernel]) -> tuple[int, int]:
    """Return the shape (out, in) of the weight that holds ``kernels``."""
    inputs, outputs = kernels[0].shape
    return outputs * kernels[0].layout.parts, inputs


def _size(update: Update) -> str:
    """Return the shape of the weight of an update, as far as its arrays tell it."""
    if update.a.size:
        return f"{(update.b.shape[0], update.a.shape[1])}"
    return f"{int(update.indices[-1]) + 1 if update.indices.size else 0} or more entries"


def _fits(update: Update, kernels: list[_Kernel]) -> bool:
    outputs, inputs = _weight(kernels)
    low = not update.a.size or (update.b.shape[0], update.a.shape[1]) == (outputs, inputs)
    indices = update.indices
    return low and (not indices.size or (indices[0] >= 0 and indices[-1] < outputs * inputs))


def _check_base(
    peft: Peft,
    base: str,
    updates: Mapping[str, tuple[Update, list[_Kernel]]],
    saved: Mapping[str, tuple[tensors.Stored, list[_Kernel]]],
) -> None:
    """Raise `InputError` unless every tensor of an adapter has its place in the model, of its shape."""
    absent = [f"{module} {_size(update)}" for module, (update, places) in updates.items() if not places]
    absent += [f"{name} {stored.shape}" for name, (stored, places) in saved.items() if not places]
    other = [
        f"{module} is {_size(update)} in the adapter, {_weight(places)} in the base"
        for module, (update, places) in updates.items()
        if places and not _fits(update, places)
    ]
    for name, (stored, places) in saved.items():
        expected = hf_layout.stored_shape(places[0].layout, places[0].shape) if places else stored.shape
        if stored.shape != expected:
            other.append(f"{name} is {stored.shape} in the adapter, {expected} in the base")
    conv = [
        module
        for module, (update, places) in updates.items()
        if update.indices.size and places and not places[0].layout.transposed
    ]
    if conv:
        raise InputError(f"{peft.file}: {conv[0]} has sparse values and is no linear layer, whose weight is (out, in)")
    if absent or other:
        parts = [f"no place for {_few(absent)}"] if absent else []
        parts += [f"other shapes: {_few(other)}"] if other else []
        named = peft.settings.get("base_model_name_or_path")
        raise InputError(
            f"{peft.file}: the adapter does not fit {base}: {'; '.join(parts)}; give the base and the task that the adapter "
            f"was trained for{f' ({named})' if named else ''}"
        )


def _check_complete(peft: Peft, kernels: Mapping[str, list[_Kernel]], updated: Collection[str]) -> None:
    """Raise `InputError` where ``target_modules`` names a linear layer of the base without an update in the file."""
    missing = [
        module
        for module, (first, *_) in kernels.items()
        if first.path not in updated and is_target(peft.settings, module)
    ]
    if missing:
        raise InputError(
            f"{peft.file}: no update of {_few(missing)}, which target_modules of {ADAPTER_CONFIG} names: the adapter is not "
            "complete; save or download it again"
        )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _at_kernel(update: Update, kernel: _Kernel, scale: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the update of a kernel (in, out), with ``scale`` for a @ b, and its support."""
    inputs, width = kernel.shape
    columns = hf_layout.outputs(kernel.layout, width * kernel.layout.parts)
    delta: dict[str, np.ndarray] = {}
    support = np.zeros((0, 2), np.int32)
    if update.a.size:
        delta["a"] = np.ascontiguousarray(update.a.T)
        delta["b"] = np.ascontiguousarray(update.b[columns].T * np.float32(update.scale / scale))
    if update.indices.size:
        column = np.full(width * kernel.layout.parts, -1)
        column[columns] = np.arange(width)
        outer, row = np.divmod(update.indices, inputs)
        own = np.flatnonzero(column[outer] >= 0)
        own = own[np.lexsort((column[outer[own]], row[own]))]
        if own.size:
            support = np.stack([row[own], column[outer[own]]], axis=1).astype(np.int32)
            delta["values"] = update.values[own]
    return delta, support
