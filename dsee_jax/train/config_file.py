"""The YAML file of a run: read with overrides, written back, and the documentation of its keys."""

import ast
import contextlib
import copy
import dataclasses
import inspect
import itertools
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args, get_origin

import yaml

from dsee_jax.config import Config
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime import input_file, storage, strict_yaml


def read(
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    earlier: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: raw,
) -> Config:
    """Return the `Config` of a YAML file with ``section.key=value`` overrides on top.

    Args:
      path: a YAML file; None for the defaults.
      overrides: ``section.key=value`` (leading dashes are allowed); values are YAML.
      earlier: completes the content of a file that an earlier version wrote.

    Raises:
      InputError: unreadable file, unknown key, or a value that does not fit; the message names the key.
    """
    values = [_override(override) for override in overrides]
    raw = earlier(_load(storage.as_path(path))) if path is not None else {}
    before = copy.deepcopy(raw)
    for key, value in values:
        _insert(raw, key, value)
    try:
        return _section(Config, raw, "")
    except InputError as error:
        # The file is named where it fails in the same way without the overrides.
        raise InputError(
            f"{path}: {error}" if path is not None and _error(before) == str(error) else str(error)
        ) from None


def _error(raw: Mapping[str, Any]) -> str:
    try:
        _section(Config, raw, "")
    except InputError as error:
        return str(error)
    return ""


def dump(config: Config) -> str:
    """Return the YAML text that `read` turns into an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted key: ``train.seed``."""
    return dict(_flat(dataclasses.asdict(config), ""))


def _flat(sections: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in sections.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _load(path: storage.Place) -> dict[str, Any]:
    raw = strict_yaml.parse(str(path), input_file.read_text(path, "a config in YAML")).content
    if raw is not None and not isinstance(raw, dict):
        raise InputError(f"{path}: expected sections such as 'model:' and 'data:', found {type(raw).__name__}")
    return raw or {}


def _override(override: str) -> tuple[str, Any]:
    """Return the key and the value of ``--section.key=value``."""
    key, equals, text = override.lstrip("-").partition("=")
    if not equals or not key:
        raise InputError(f"{override!r} is not an override; write --section.key=value, as in --train.seed=1")
    if "#" in text and text[0] not in "\"'[":  # no comment but a part of a path
        return key, text
    try:
        return key, strict_yaml.parse(key, text).content
    except InputError:
        return key, text


def _insert(raw: dict[str, Any], key: str, value: Any) -> None:
    node, (*sections, last) = raw, key.split(".")
    for section in sections:
        node[section] = {} if node.get(section) is None else node[section]
        node = node[section]
        if not isinstance(node, dict):
            raise InputError(f"--{key}: {section!r} is not a section")
    node[last] = value


def _section(kind: Any, raw: Mapping[str, Any], prefix: str) -> Any:
    """Return the dataclass ``kind`` of a mapping; keys are checked before any value."""
    kinds = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in raw:
        if name not in kinds:
            where = f"section {prefix.rstrip('.')!r}" if prefix else "the config"
            raise InputError(
                f"unknown key '{prefix}{name}' in {where}{did_you_mean(str(name), kinds)}; it has {', '.join(kinds)}"
            )
    values = {}
    for name, value in raw.items():
        if not dataclasses.is_dataclass(kinds[name]):
            values[name] = _value(kinds[name], value)
        elif value is None:  # a section without keys
            continue
        elif isinstance(value, Mapping):
            values[name] = _section(kinds[name], value, f"{prefix}{name}.")
        else:
            raise InputError(f"'{prefix}{name}' is a section of keys, found {value!r}")
    return kind(**values)


def _value(kind: Any, raw: Any) -> Any:
    """Return a YAML value as the type of its field, where YAML reads another: 5e-4 is text, 2024 a number, nothing is null.

    A value that does not fit the type is returned as it is, for the section to refuse.
    """
    if get_origin(kind) is Sequence:
        return tuple(_value(str, item) for item in raw) if isinstance(raw, list) else raw
    if kind is str:
        return raw if isinstance(raw, list | dict) else "" if raw is None else str(raw)
    if kind is bool and isinstance(raw, str):
        return {"true": True, "false": False}.get(raw, raw)
    kinds = get_args(kind) or (kind,)
    if isinstance(raw, str) or (kind is float and type(raw) is int):
        for number in (number for number in (int, float) if number in kinds):
            with contextlib.suppress(ValueError, OverflowError):
                return number(raw)
    return raw


def keys(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield every key of a config, or of a section, by its dotted name; with its values where it has a choice, else ()."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, get_args(field.type) if get_origin(field.type) is Literal else ()


def describe() -> str:
    """Return every key with its choices, default and meaning, for ``--keys``."""
    lines = []
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            lines += _described(cast(type, section.type), section.name)
        else:
            lines += [f"\n{section.name} = {section.default!r}", _wrapped(_docs(Config)[section.name], indent=4)]
    return "\n".join(lines)


def _described(kind: type, section: str) -> list[str]:
    """Return the lines of a section; those of the sections inside of it come last."""
    lines, inner = ["\n" + _wrapped(f"{section}: {ast.get_docstring(_source(kind))}", indent=0)], []
    for field in dataclasses.fields(kind):
        key = f"{section}.{field.name}"
        if dataclasses.is_dataclass(field.type):
            inner += _described(cast(type, field.type), key)
            continue
        choices = get_args(field.type)
        allowed = f"  [{'|'.join(map(str, choices))}]" if get_origin(field.type) is Literal else ""
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        lines += [f"  {key} = {default!r}{allowed}", _wrapped(_docs(kind)[field.name], indent=6)]
    return lines + inner


def _wrapped(text: str, *, indent: int) -> str:
    margin, text = " " * indent, text.replace("``", "")
    return textwrap.fill(
        text, 120, initial_indent=margin, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
    )


def _source(kind: type) -> ast.ClassDef:
    """Return the source of a class, whose docstring ``python -OO`` drops."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    return cast(ast.ClassDef, body)


def _docs(kind: type) -> dict[str, str]:
    """Return the string below each field of a dataclass, which Python itself does not keep."""
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in itertools.pairwise(_source(kind).body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }
