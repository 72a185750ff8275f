"""The YAML file of a run: read with overrides, written back, and the documentation of its keys."""

import ast
import dataclasses
import inspect
import itertools
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args, get_origin

import draccus
import yaml

from dsee_jax.config import Config, check
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime import storage


def read(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the checked `Config` of a YAML file with ``section.key=value`` overrides on top.

    Args:
      path: a YAML file; None for the defaults.
      overrides: ``section.key=value`` (leading dashes are allowed); values are YAML.

    Raises:
      InputError: unreadable file, unknown key, or a value that does not fit; the message names the key.
    """
    raw = _load(storage.as_path(path)) if path is not None else {}
    for override in overrides:
        _override(raw, override)
    _known(Config, raw, "")
    try:
        config = draccus.decode(Config, raw)
    except draccus.ParsingError as error:
        raise InputError(f"{path or 'config'}: {' '.join(str(error).split())}") from None
    check(config)
    return config


def dump(config: Config) -> str:
    """Return the YAML text that `read` turns into an equal config."""
    return yaml.safe_dump(draccus.encode(config), sort_keys=False)


def _load(path: storage.Place) -> dict[str, Any]:
    try:
        with storage.store_errors(path):
            held = path.read_bytes()
        raw = yaml.safe_load(held.decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the config: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deep; expected sections such as 'model:' and 'data:'") from None
    if raw is not None and not isinstance(raw, dict):
        raise InputError(f"{path}: expected sections such as 'model:' and 'data:', found {type(raw).__name__}")
    return raw or {}


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.lstrip("-").partition("=")
    if not equals or not key:
        raise InputError(f"{override!r} is not an override; write --section.key=value, as in --train.seed=1")
    node, (*sections, last) = raw, key.split(".")
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise InputError(f"{override!r}: {section!r} is not a section")
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        node[last] = text


def _known(kind: type, raw: Mapping[str, Any], prefix: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in raw.items():
        if name not in fields:
            where = f"section {prefix.rstrip('.')!r}" if prefix else "the config"
            raise InputError(
                f"unknown key '{prefix}{name}' in {where}{did_you_mean(str(name), fields)}; it has {', '.join(fields)}"
            )
        nested = fields[name].type
        if dataclasses.is_dataclass(nested):
            if not isinstance(value, Mapping):
                raise InputError(f"'{prefix}{name}' is a section of keys, found {value!r}")
            _known(cast(type, nested), value, f"{prefix}{name}.")


def describe() -> str:
    """Return every key with its type, default and meaning, for ``--help``."""
    lines = []
    for section in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(section.type):
            lines.append(f"\n{section.name} = {section.default!r}\n    {_docs(Config)[section.name]}")
            continue
        kind = cast(type, section.type)
        lines.append(f"\n{section.name}: {inspect.getdoc(kind)}")
        for field in dataclasses.fields(kind):
            choices = get_args(field.type)
            allowed = f"  [{'|'.join(map(str, choices))}]" if get_origin(field.type) is Literal else ""
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            lines.append(
                f"  {section.name}.{field.name} = {default!r}{allowed}\n      {_docs(kind).get(field.name, '')}"
            )
    return "\n".join(lines)


def _docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, which Python itself does not keep."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    statements = cast(ast.ClassDef, body).body
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in itertools.pairwise(statements)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }
