"""References to models in a recipe: text, or the mappings that mergekit writes for some paths."""

from collections.abc import Callable
from typing import Any

from dsee_jax.errors import InputError
from dsee_jax.runtime.strict_yaml import shown
from merge.recipes import values

_NOT_A_MODEL = ("base", "union")


def text(where: str, raw: Any) -> str:
    """Return a reference as ``path[@revision][+adapter[@revision]]``.

    Args:
      where: recipe path and key path, for errors.
      raw: the same text; or a mapping ``{model: PATH, lora: PATH}``, each path a text or ``{path: ..., revision: ...}``.

    Raises:
      InputError: ``raw`` is neither.
    """
    if not isinstance(raw, dict):
        return values.text(where, raw)
    unknown = raw.keys() - {"model", "lora", "override_architecture"}
    if unknown or raw.get("model") is None:
        raise InputError(f"{where} is {shown(raw)}; expected text, or a mapping with model and, for an adapter, lora")
    if raw.get("override_architecture") is not None:
        raise InputError(f"{where}.override_architecture is not supported; leave it out")
    parts = [_path(f"{where}.{key}", raw[key]) for key in ("model", "lora") if raw.get(key) is not None]
    return values.text(where, "+".join(parts))


def mapped(raw: Any, model: Callable[[str], str], file: Callable[[str], str]) -> Any:
    """Return a copy of a checked recipe with ``model(reference)`` for references and ``file(path)`` for statistics files."""

    def visit(node: Any, inside: str) -> Any:
        if isinstance(node, list):
            return [visit(item, inside) for item in node]
        return {key: replaced(key, value, inside) for key, value in node.items()} if isinstance(node, dict) else node

    def replaced(key: str, value: Any, inside: str) -> Any:
        if inside == "tokens":  # the keys are tokens
            return visit(value, "token")
        if value is None or key == "parameters":
            return value
        if key == "tokenizer_source" or (inside, key) == ("tokenizer", "source"):
            return value if value in _NOT_A_MODEL else model(text(key, value))
        embedding = (inside, key) == ("token", "source")
        if key in ("model", "base_model") or (embedding and not (isinstance(value, dict) and "kind" in value)):
            return model(text(key, value))
        if key == "statistics" and isinstance(value, str):
            return file(value)
        return visit(value, key if key == "tokenizer" or (inside, key) == ("tokenizer", "tokens") else inside)

    return visit(raw, "")


def _path(where: str, raw: Any) -> str:
    if not isinstance(raw, dict):
        return values.text(where, raw)
    if raw.keys() - {"path", "revision"} or raw.get("path") is None:
        raise InputError(f"{where} is {shown(raw)}; expected text, or a mapping with path and revision")
    parts = [values.text(f"{where}.{key}", raw[key]) for key in ("path", "revision") if raw.get(key) is not None]
    return "@".join(parts)
