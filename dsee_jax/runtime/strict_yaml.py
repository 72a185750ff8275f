"""Strict YAML: a small file is read into dicts, lists and scalars, or refused with one line that names the error.

The reader works on the parser's events. It refuses foreign tags, a key with two values, deep nesting and aliases that expand
to many values, so that the result cannot expand or nest without bound. Scalars and merge keys (``<<``) are read as PyYAML
reads YAML 1.1, but dates stay text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from dsee_jax.errors import InputError

DEEPEST = 32
"""The deepest nesting that is read."""

MOST = 1_000_000
"""The maximum size after the expansion of aliases: values, a long text counting as one for every 64 characters."""
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


class _Value(NamedTuple):
    """A complete value, with the size and the height of its tree."""

    value: Any
    size: int = 1
    height: int = 0


@dataclass
class _Open:
    """A collection that is being read."""

    value: Any  # dict or list
    event: Any  # the collection's first event
    size: int = 1
    height: int = 1
    key: Any = None  # of a mapping: the event of the key whose value comes next
    merged: list[Mapping[str, Any]] = field(default_factory=list)  # the mappings of merge keys


class Document(NamedTuple):
    """A YAML document."""

    text: str
    content: Any  # dicts, lists and scalars; keys are their text as written, and aliases share their value
    holders: frozenset[str]  # the keys at the top that hold the anchor of an alias


def parse(where: str, text: str, *, second: str = "") -> Document:
    """Return the one YAML document in ``text``.

    Args:
      where: the file or key, for errors.
      text: the YAML.
      second: the way out for the author of several documents, a part of the error.

    Raises:
      InputError: the text is not YAML, or has a construct that this module refuses; the message begins with ``where``.
    """
    if _halves(text):
        raise InputError(f"{where}: a character that no file can hold")
    try:
        return Document(text, *_parse(where, yaml.parse(text, Loader=_LOADER), second))
    except yaml.YAMLError as error:
        # libyaml scans ahead of its events, and some releases have a depth limit of their own, beyond `DEEPEST`.
        if "maximum nesting depth" in str(error):
            raise InputError(f"{where}: nested deeper than {DEEPEST} levels") from None
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())[:300]}") from None


def _parse(where: str, events: Any, second: str) -> tuple[Any, frozenset[str]]:
    open_collections: list[_Open] = []
    anchors: dict[str, _Value] = {}
    places: dict[str, Any] = {}  # the event of the key at the top that holds each anchor
    holders: set[str] = set()
    root: Any = None

    def fail(event: Any, problem: str) -> InputError:
        return InputError(f"{where}: line {event.start_mark.line + 1}: {problem}")

    def place(event: Any, part: _Value) -> None:
        nonlocal root
        if not open_collections:
            if root is not None and part.value is not None:
                raise fail(event, f"a second document begins; expected one{second and f': {second}'}")
            root = part.value if root is None else root
            return
        parent = open_collections[-1]
        parent.size += part.size
        parent.height = max(parent.height, part.height + 1)
        if sum(collection.size for collection in open_collections) > MOST:
            raise fail(event, f"more than {MOST:,} values, aliases expanded")
        if len(open_collections) + part.height > DEEPEST:
            raise fail(event, f"nested deeper than {DEEPEST} levels")
        if isinstance(parent.value, list):
            parent.value.append(part.value)
            return
        if parent.key is None:
            parent.key = event
            return
        key, parent.key = parent.key, None
        if _tag(key).endswith(":merge"):
            parent.merged.append(
                _mapping(part.value, lambda: fail(key, "<< is no mapping; expected an alias such as *NAME"))
            )
        elif key.value in parent.value and repr(parent.value[key.value]) != repr(part.value):
            raise fail(key, f"the key {shown(key.value)} is repeated with another value; keep one")
        else:
            parent.value[key.value] = part.value

    def end() -> tuple[Any, _Value]:
        done = open_collections.pop()
        value = done.value
        if done.merged:
            value = {key: item for mapping in reversed(done.merged) for key, item in mapping.items()} | value
        return done.event, _Value(value, done.size, done.height)

    for event in events:
        expects_key = bool(open_collections) and isinstance(open_collections[-1].value, dict)
        expects_key = expects_key and open_collections[-1].key is None
        if getattr(event, "anchor", None) and not isinstance(event, yaml.AliasEvent):
            places[event.anchor] = open_collections[0].key if open_collections else None
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise fail(event, f"the alias *{event.anchor} refers to no value before it")
            if expects_key:
                raise fail(event, "a key is an alias; write the key in full")
            holders |= {places[event.anchor].value} if places[event.anchor] else set()
            place(event, anchors[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            if _halves(event.value):
                raise fail(event, "a character that no file can hold")
            part = _Value(event.value if expects_key else _scalar(event), 1 + len(event.value) // 64)
            anchors |= {event.anchor: part} if event.anchor else {}
            place(event, part)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            if expects_key:
                raise fail(event, "a key is a list or a mapping; expected text")
            if event.tag not in (None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
                raise fail(event, f"the tag {shown(event.tag)} is not supported; leave it out")
            if len(open_collections) == DEEPEST:
                raise fail(event, f"nested deeper than {DEEPEST} levels")
            open_collections.append(_Open({} if isinstance(event, yaml.MappingStartEvent) else [], event))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            first, part = end()
            anchors |= {first.anchor: part} if first.anchor else {}
            place(first, part)
    return root, frozenset(holders)


def _mapping(value: Any, error: Any) -> Mapping[str, Any]:
    """Return the mapping that a merge key inserts: of several, the first that has a key gives its value."""
    mappings = value if isinstance(value, list) else [value]
    if not all(isinstance(mapping, dict) for mapping in mappings):
        raise error()
    return {key: item for mapping in reversed(mappings) for key, item in mapping.items()}


class _InFull(yaml.SafeDumper):
    """Writes a value that stands in several places in full in each, without anchors and aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return whether a value gets no anchor."""
        del data
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Quote the line breaks of YAML 1.1 that PyYAML would write as they are, and read as other breaks."""
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_InFull.add_representer(str, _InFull.represent_str)


def dump(value: Any) -> str:
    """Return plain dicts, lists and scalars as YAML that `parse` reads back to an equal value."""
    return yaml.dump(value, Dumper=_InFull, sort_keys=False, allow_unicode=True)


def _halves(text: str) -> bool:
    """Return whether a text has a half of a pair of characters, which UTF-8 cannot hold."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _tag(event: Any) -> str:
    """Return the tag of a scalar, written or implied."""
    if event.tag not in (None, "!"):
        return event.tag
    return _RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit)


def _scalar(event: Any) -> Any:
    tag = _tag(event)
    construct = _SCALARS.get(tag.removeprefix("tag:yaml.org,2002:"))
    node = yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark)
    try:
        if construct is None:
            raise ValueError("the tag is not supported; leave it out")
        if len(event.value) > _LONGEST_NUMBER and tag.endswith((":int", ":float")):
            raise ValueError(f"a number of more than {_LONGEST_NUMBER} characters")
        return construct(node)
    except (ValueError, LookupError, ArithmeticError) as error:
        raise yaml.MarkedYAMLError(problem=f"{shown(event.value)}: {error}", problem_mark=event.start_mark) from None
