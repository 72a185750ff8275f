"""The settings of a recipe: a scalar, or a gradient over the layers, for all tensors or for tensors filtered by name.

Every form is stored as a tuple of `Choice`, checked against the method's `Option`; `evaluate` returns the value of one tensor.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime.strict_yaml import shown
from merge.mergekit_flags import FLAGS
from merge.method import Option
from merge.recipes import keys
from merge.recipes.values import LONGEST


class Choice(NamedTuple):
    """Values for the tensors whose name contains ``filter``; None for all tensors."""

    filter: str | None
    values: tuple[Any, ...]  # one value, or a gradient from the first layer to the last


Setting: TypeAlias = tuple[Choice, ...]
"""The first choice whose filter matches gives the value. If no filter matches, the next level of the recipe gives it."""

Settings: TypeAlias = Mapping[str, Setting]

_TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

Unused: TypeAlias = dict[str, list[str]]
"""The parameters that the method does not use, each with the key paths where it stands."""


def read(where: str, path: str, raw: Any, options: Mapping[str, Option], method: str, unused: Unused) -> Settings:
    """Return the checked settings of one ``parameters`` of a recipe.

    Args:
      where: recipe path, for errors.
      path: key path.
      raw: the parsed YAML; None for nothing.
      options: the method's options.
      method: the method's name, for errors.
      unused: takes the parameters that only other methods use, and keys of the recipe's top.

    Raises:
      InputError: an unknown option, or an invalid value; one line that names the key path.
    """
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"{where}: {path} is {shown(raw)}; expected parameters such as 'weight: 0.5'")
    settings: dict[str, Setting] = {}
    for key, value in raw.items():
        if key in options:
            settings[key] = _setting(f"{where}: {path}.{key}", value, options[key])
        elif key in keys.OPTIONS or key in keys.TOP or key in FLAGS:
            unused.setdefault(key, []).append(path)
        else:
            known = {**options, **dict.fromkeys(keys.OPTIONS)}
            raise InputError(
                f"{where}: {path}.{shown(key)[1:-1]} is a parameter of no method{did_you_mean(key[:100], known)}; "
                f"{method} has {', '.join(options) or 'none'}"
            )
    return settings


def evaluate(where: str, setting: Setting, option: Option, name: str, t: float) -> Any:
    """Return the value of ``setting`` for the tensor ``name`` at relative depth ``t`` in [0, 1]; None: no filter matches.

    Numbers in a gradient are interpolated linearly; for other values the result is ``values[int(t * (n - 1))]``.
    """
    for choice in setting:
        if choice.filter is None or choice.filter in name:
            values = choice.values
            if len(values) == 1:
                return values[0]
            position = t * (len(values) - 1)
            low = int(position)
            if option.kind not in (int, float):
                return values[low]
            high = min(low + 1, len(values) - 1)
            value = (1 - (position - low)) * values[low] + (position - low) * values[high]
            return value if option.kind is float else option.check(where, value)
    return None


def lookup(where: str, key: str, option: Option, levels: Iterable[tuple[str, Settings]], name: str, t: float) -> Any:
    """Return the value of the option ``key`` for one tensor: from the first of ``levels`` that has a value, else the default.

    Args:
      where: the recipe's path, for errors.
      key: the option's name.
      option: its type, range and default.
      levels: ``(key path, settings)``, the nearest first.
      name: the tensor's name.
      t: its relative depth.

    Raises:
      InputError: no level has a value for this tensor, and the option has no default.
    """
    tried = []
    for path, settings in levels:
        if key in settings:
            value = evaluate(f"{where}: {path}.{key} for {shown(name)}", settings[key], option, name, t)
            if value is not None:
                return value
            tried.append(f"{path}.{key}")
    if option.default is None:
        raise InputError(
            f"{where}: {' and '.join(tried) or key} gives no value for {shown(name)}: no filter matches its name; "
            "add a last entry without filter"
        )
    return option.default


def scalar(where: str, value: Any, option: Option) -> Any:
    """Return one value in the option's type; text such as ``1e-3``, which YAML 1.1 does not read as a number, is accepted.

    Raises:
      InputError: a value of another type, not finite, or out of range.
    """
    if isinstance(value, str) and len(value) > LONGEST:
        raise InputError(f"{where} is text of {len(value)} characters; expected {option.expected}")
    if isinstance(value, (dict, list)) or value is None:
        raise InputError(f"{where} is {'empty' if value is None else shown(value)}; expected {option.expected}")
    if option.kind is bool and isinstance(value, str):
        value = _TRUTHS.get(value.lower(), value)
    if option.kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise InputError(f"{where} is {shown(value)}; expected {option.expected}") from None
        if not math.isfinite(number):
            raise InputError(f"{where} is {shown(value)}; expected {option.expected}, and finite")
        value = value if isinstance(value, int) else number
    return option.check(where, value)


def _setting(where: str, raw: Any, option: Option) -> Setting:
    if isinstance(raw, dict):
        return (_choice(where, raw, option),)
    if isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        for number, item in enumerate(raw):
            if not isinstance(item, dict):
                raise InputError(
                    f"{where}[{number}] is {shown(item)} among entries with filters; write {{filter: NAME, value: ...}}"
                )
        return tuple(_choice(f"{where}[{number}]", item, option) for number, item in enumerate(raw))
    return (Choice(None, _values(where, raw, option)),)


def _choice(where: str, raw: Mapping[str, Any], option: Option) -> Choice:
    for key in raw:
        if key not in ("filter", "value"):
            raise InputError(
                f"{where}.{shown(key)[1:-1]} is unknown{did_you_mean(key[:100], ('filter', 'value'))}; "
                "expected filter and value"
            )
    if "value" not in raw:
        raise InputError(f"{where} lacks 'value'; write {{filter: NAME, value: ...}}")
    name = raw.get("filter")
    if name is not None and not isinstance(name, str):
        raise InputError(f"{where}.filter is {shown(name)}; expected a part of tensor names, in quotes")
    return Choice(None if name == "*" else name, _values(f"{where}.value", raw["value"], option))


def _values(where: str, raw: Any, option: Option) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        return (scalar(where, raw, option),)
    if not raw:
        raise InputError(f"{where} is an empty list; expected {option.expected}, or a gradient of them")
    return tuple(scalar(f"{where}[{number}]", item, option) for number, item in enumerate(raw))
