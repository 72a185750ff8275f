"""The values of a recipe as they stand in its YAML: the file, text, and lists of mappings."""

from collections.abc import Mapping
from typing import Any

from dsee_jax.errors import InputError
from dsee_jax.runtime import input_file, strict_yaml
from dsee_jax.runtime.storage import Place
from dsee_jax.runtime.strict_yaml import Document, shown

LONGEST = 1000
"""The maximum length of most text values, in characters."""

_SEVERAL = (
    "write each recipe into a file of its own, run them in order, and name the OUT_DIR of the first where the second names "
    "its model"
)


def read(path: Place) -> Document:
    """Return the document of a recipe; raises `InputError` as `strict_yaml.parse` does, or where reading fails."""
    return strict_yaml.parse(str(path), input_file.read_text(path, "a recipe in YAML"), second=_SEVERAL)


def items(path: Place, key: str, raw: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return ``(key path, mapping)`` of each entry; raises `InputError` unless ``raw`` is a non-empty list of mappings."""
    if not isinstance(raw, list) or not raw:
        content = "is an empty list" if raw == [] else f"is {shown(raw)}"
        raise InputError(f"{path}: {key} {content}; expected a list")
    for number, item in enumerate(raw):
        if not isinstance(item, dict):
            first = "sources" if key == "slices" else "model"
            raise InputError(f"{path}: {key}[{number}] is {shown(item)}; expected '- {first}: ...'")
    return [(f"{key}[{number}]", item) for number, item in enumerate(raw)]


def text(where: str, raw: Any, longest: int = LONGEST) -> str:
    """Return ``raw``; raises `InputError`, beginning with ``where``, unless ``raw`` is text and not blank."""
    if not isinstance(raw, str):
        raise InputError(f"{where} is {shown(raw)}; expected text: put it in quotes")
    if not raw.strip() or len(raw) > longest or "\0" in raw:
        raise InputError(f"{where} is {shown(raw)}; expected text of 1 to {longest} characters")
    return raw
