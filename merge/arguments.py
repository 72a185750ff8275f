# pyright: strict
"""The options of a merge in memory: a number, one value per model, or a mapping from parts of the model to values."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsee_jax import hf_layout, tree
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Array
from merge.method import KEYWORDS, Method, Option

Value = TypeVar("Value")

Number: TypeAlias = float | Array
"""A number, or an array of shape (), which may be traced."""

PerModel: TypeAlias = Number | Sequence[Number]
"""One number for all models, or one number per model: a sequence, or an array (models,), which may be traced."""

Each: TypeAlias = PerModel | Mapping[str, PerModel]
"""A per-model option, the same for all tensors or ``{layer, path or regular expression: value}``."""

Shared: TypeAlias = Value | Mapping[str, Value]
"""An option that all models share, the same for all tensors or ``{layer, path or regular expression: value}``."""

AnyOption: TypeAlias = Number | str | Sequence[Number] | Mapping[str, Number | str | Sequence[Number]] | None
"""A value of any option."""

REST = ".*"
"""The key of a mapping that gives the value of all tensors that no other key matches."""


def resolve(
    method: Method, name: str, options: Mapping[str, AnyOption], names: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """Return the checked value of every option of ``method`` for each tensor, by keyword.

    Args:
      method: from `merge.methods.find`.
      name: the method's name, for errors.
      options: by keyword.
      names: the tensors to merge.
      count: the number of models.

    Raises:
      InputError: an unknown option, a value of another type or out of range, another number of values than ``count``, or a key
        of a mapping that matches no tensor or the same tensor as another key.
    """
    accepted = {KEYWORDS.get(key, key): option for key, option in {**method.each, **method.shared}.items()}
    each = {KEYWORDS.get(key, key) for key in method.each}
    extra: set[str] = {"coefficients"} if name == "rankmean" or options.get("over") == "rankmean" else set()
    for key in options:
        if key not in accepted and key not in extra:
            near = did_you_mean(key, accepted)
            raise InputError(f"{name} has no option {key!r}{near}; it has {', '.join(sorted(accepted)) or 'none'}")
    common: dict[str, Any] = {key: options[key] for key in extra & options.keys()}
    own: dict[str, dict[str, Any]] = {}
    for key, option in accepted.items():
        check = partial(_per_model, count=count) if key in each else _checked
        where, default = f"{name}: {key}", 1.0 if key == "weight" else option.default
        value = options.get(key, default)
        if isinstance(value, Mapping):
            own[key] = _by_tensor(where, value, check, option, default, names)
        elif value is None:
            raise InputError(f"{name} needs the option {key!r}: {option.help}; expected {option.expected}")
        else:
            common[key] = check(where, option, value)
    if not own:
        _check_together(method, name, common)
        return [common for _ in names]
    resolved = [common | {key: values[tensor] for key, values in own.items()} for tensor in names]
    for tensor, keywords in zip(names, resolved, strict=True):
        _check_together(method, f"{name}, for {tensor!r}", keywords)
    return resolved


def _check_together(method: Method, where: str, keywords: Mapping[str, Any]) -> None:
    method.check(where, **{key: value for key, value in keywords.items() if key != "coefficients"})


def _by_tensor(
    where: str, mapping: Mapping[str, Any], check: Any, option: Option, default: Any, names: Sequence[str]
) -> dict[str, Any]:
    """Return ``{name: checked value}`` of all ``names``."""
    values = {str(key): check(f"{where}[{key!r}]", option, value) for key, value in mapping.items()}
    keys = _keys(where, mapping, names)
    outside = [name for name in names if name not in keys]
    if outside and default is None:
        raise InputError(
            f"{where} has no value for {outside[0]!r}; add the key {REST!r}: the value of all other tensors"
        )
    otherwise = check(where, option, default) if outside else None
    return {name: values[keys[name]] if name in keys else otherwise for name in names}


def _keys(where: str, keys: Iterable[object], names: Sequence[str]) -> dict[str, str]:
    """Return ``{name: the key that matches it}``; raises `InputError` as `resolve` does.

    The order of the keys has no meaning: inside ``jax.jit`` and ``jax.grad``, the keys of a dict are sorted.
    """
    layers = hf_layout.layers_by_name(names)
    chosen: dict[str, str] = {}
    for key in sorted(map(str, keys), key=lambda key: key == REST):
        if key in layers.values():
            matches = [name for name in names if layers[name] == key]
        elif key in names:
            matches = [key]
        else:
            try:
                matches = tree.select([key], names)
            except InputError as error:
                known = ", ".join(dict.fromkeys(layer for layer in layers.values() if layer is not None))
                raise InputError(f"{where}: {error}{f'; the layers are {known}' if known else ''}") from None
        if key == REST:
            matches = [name for name in matches if name not in chosen]
            if not matches:
                raise InputError(f"{where}: {REST!r} matches nothing: the other keys match all tensors; leave it out")
        for name in matches:
            if name in chosen:
                raise InputError(
                    f"{where}: {chosen[name]!r} and {key!r} both match {name!r}; the keys of a mapping have no order: "
                    f"let one key match each tensor, and {REST!r} all others"
                )
            chosen[name] = key
    return chosen


def _per_model(where: str, option: Option, value: Any, *, count: int) -> Sequence[Any] | jax.Array:
    """Return ``value`` as a sequence or an array of ``count`` values, one per model."""
    if _traced(value):
        _check_traceable(where, option)
        if value.shape not in ((), (count,)):
            raise InputError(
                f"{where} has shape {value.shape} for {count} models; give one each, or one number for all"
            )
        return jnp.broadcast_to(value, (count,))
    values = value if _is_sequence(value) else [value] * count
    if len(values) != count:
        raise InputError(f"{where} has {len(values)} values for {count} models; give one each, or one number for all")
    checked = [_checked(f"{where}[{number}]", option, item) for number, item in enumerate(values)]
    return jnp.stack(checked) if any(map(_traced, checked)) else checked


def _checked(where: str, option: Option, value: Any) -> Any:
    if _is_array(value) and value.shape:
        raise InputError(f"{where} has shape {value.shape}; expected {option.expected}")
    if _traced(value):
        _check_traceable(where, option)
        return value
    return option.check(where, value.item() if _is_array(value) else value)


def _check_traceable(where: str, option: Option) -> None:
    if option.kind is not float or option.static:
        raise InputError(f"{where} is traced; expected a constant: close over it or make it static")


def _traced(value: object) -> bool:
    return isinstance(value, Tracer)


def _is_sequence(value: Any) -> bool:
    return value.ndim > 0 if _is_array(value) else isinstance(value, Sequence) and not isinstance(value, str)


def _is_array(value: object) -> bool:
    return isinstance(value, np.generic | np.ndarray | jax.Array)
