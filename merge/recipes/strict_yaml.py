"""Strict YAML: a small file is read into dicts, lists and scalars, or refused with one line that names the error.

The reader works on the parser's events and refuses aliases, repeated keys, foreign tags and deep nesting, so that the result
cannot expand or nest without bound. Scalars are read as PyYAML reads YAML 1.1, but dates stay text.
"""

from collections.abc import Collection, Mapping
from typing import Any

import yaml

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime import storage
from dsee_jax.runtime.storage import Place

LARGEST = 1_000_000
"""The largest file that is read, in bytes."""

DEEPEST = 32
"""The deepest nesting that is read."""

LONGEST = 1000
"""The maximum length of most text values, in characters."""

_REFUSED = {
    "modules": "models of several modules are not supported; merge each with a recipe of its own",
    "residual_weight": "it is not supported (mergekit ignores it); leave it out",
    "input_model_parameters": "it is not supported (mergekit dropped it); write parameters beside each model",
}
_LONGEST_NUMBER = 400  # characters; Python refuses to print integers of several thousand digits

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER = yaml.resolver.Resolver()
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
_SCALARS = {
    "null": lambda node: None,
    "bool": _CONSTRUCTOR.construct_yaml_bool,
    "int": _CONSTRUCTOR.construct_yaml_int,
    "float": _CONSTRUCTOR.construct_yaml_float,
    "str": lambda node: node.value,
    "timestamp": lambda node: node.value,
    "value": lambda node: node.value,
    "merge": lambda node: node.value,
}


def shown(value: Any) -> str:
    """Return ``repr(value)``, shortened in the middle to fit into an error message."""
    if isinstance(value, str) and len(value) > 200:
        value = value[:200]
    text = f"{type(value).__name__} of {len(value)}" if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= 160 else f"{text[:100]}...{text[-40:]}"


def parse(where: str, text: str) -> Any:
    """Return the one YAML document in ``text``; keys of dicts are their text as written.

    Raises:
      InputError: the text is not YAML, or has a construct that this module refuses; the message begins with ``where``.
    """
    # Each open collection: its content so far, and the key whose value comes next.
    open_collections: list[tuple[Any, list[str]]] = []
    root: list[Any] = []

    def fail(event: Any, problem: str) -> InputError:
        return InputError(f"{where}: line {event.start_mark.line + 1}: {problem}")

    def place(event: Any, value: Any) -> None:
        if not open_collections:
            if root:
                raise fail(event, "a second document begins; expected one")
            root.append(value)
            return
        parent, waiting = open_collections[-1]
        if isinstance(parent, list):
            parent.append(value)
        elif waiting:
            parent[waiting.pop()] = value
        elif not isinstance(event, yaml.ScalarEvent):
            raise fail(event, "a key is a list or a mapping; expected text")
        elif event.value in parent:
            raise fail(event, f"the key {shown(event.value)} is repeated; keep one")
        else:
            waiting.append(event.value)

    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise fail(event, "anchors and aliases (& and *) are not supported; write the value in full")
            if isinstance(event, yaml.ScalarEvent):
                place(event, _scalar(event))
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                if event.tag not in (None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
                    raise fail(event, f"the tag {shown(event.tag)} is not supported; leave it out")
                if len(open_collections) == DEEPEST:
                    raise fail(event, f"nested deeper than {DEEPEST} levels")
                value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
                place(event, value)
                open_collections.append((value, []))
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                open_collections.pop()
    except yaml.YAMLError as error:
        # libyaml scans ahead of its events, and some releases have a depth limit of their own, beyond `DEEPEST`.
        if "maximum nesting depth" in str(error):
            raise InputError(f"{where}: nested deeper than {DEEPEST} levels") from None
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())[:300]}") from None
    return root[0] if root else None


def read(path: Place) -> tuple[str, Any]:
    """Return the text of a YAML file and its content; raises `InputError` as `parse` does, or where reading fails."""
    try:
        with storage.store_errors(path), path.open("rb") as opened:
            raw = bytes(opened.read(LARGEST + 1))
        if len(raw) > LARGEST:
            raise InputError(f"{path}: larger than {LARGEST:,} bytes; expected a recipe in YAML")
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); expected a recipe in YAML") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the recipe: {error.strerror}") from None
    return text, parse(str(path), text)


def check_keys(where: str, raw: Mapping[str, Any], keys: Collection[str]) -> None:
    """Raise `InputError`, beginning with ``where``, for a key of ``raw`` that is not in ``keys``."""
    for key in raw:
        if key in _REFUSED:
            raise InputError(f"{where}{key}: {_REFUSED[key]}")
        if key not in keys:
            near = did_you_mean(key[:100], keys)
            raise InputError(f"{where}{shown(key)[1:-1]} is unknown{near}; expected {', '.join(keys)}")


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


def _scalar(event: Any) -> Any:
    tag = event.tag if event.tag not in (None, "!") else None
    if tag is None:
        tag = _RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit)
    construct = _SCALARS.get(tag.removeprefix("tag:yaml.org,2002:"))
    node = yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark)
    try:
        if construct is None:
            raise ValueError("the tag is not supported; leave it out")
        if len(event.value) > _LONGEST_NUMBER and tag.endswith((":int", ":float")):
            raise ValueError(f"a number of more than {_LONGEST_NUMBER} characters")
        return construct(node)
    except (ValueError, KeyError, OverflowError) as error:
        raise yaml.MarkedYAMLError(problem=f"{shown(event.value)}: {error}", problem_mark=event.start_mark) from None
