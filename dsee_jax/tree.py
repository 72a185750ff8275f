"""Nested dicts by path: ordered rules, selection, splitting, mapping.

A path joins the keys by ``/``: ``encoder/layer_0/attention/query/kernel``. Rules are ``(regex, value)`` pairs, tried in
order; a regex must match the complete path. A rule of plain text may also be the end of a path, with or without its last
part ``kernel``: ``query`` matches the path above. A rule without a leaf is an error, and so is a leaf without a rule.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Rules, Tree

_REQUIRED: Any = object()


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return ``{path: leaf}``, keys sorted at every level as JAX does; a dict that ``is_leaf`` accepts is a leaf."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping) and not (is_leaf and prefix and is_leaf(node)):
            for key, child in sorted(node.items()):
                visit(f"{prefix}/{key}" if prefix else str(key), child)
        else:
            flat[prefix] = node

    visit("", tree)
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dicts of ``{path: leaf}``, the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def get(tree: Tree, path: str) -> Any:
    """Return the leaf or subtree at ``path``; raises `InputError` with the nearest path if there is none."""
    node: Any = tree
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            raise InputError(f"no {path!r} in the tree{did_you_mean(path, flatten(tree))}")
        node = node[key]
    return node


def assign(rules: Rules, paths: Iterable[str], default: Any = _REQUIRED) -> dict[str, Any]:
    """Return the value of the first matching rule for each path.

    Args:
      rules: ordered ``(regex or end of a path, value)``; each must be the first match of at least one path.
      paths: the paths to cover.
      default: the value of paths that no rule matches; without a default, such a path is an error.

    Returns:
      ``{path: value}`` in the order of ``paths``.

    Raises:
      InputError: a regex does not compile, a rule is the first match of no path, or a path has no rule and no default.
    """
    paths = list(paths)
    try:
        compiled = [(re.compile(_regex(pattern, paths)), value) for pattern, value in rules]
    except re.error as error:
        raise InputError(f"rule {error.pattern!r} is not a regular expression: {error}") from None
    values: dict[str, Any] = {}
    used: set[int] = set()
    for path in paths:
        for number, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(path):
                used.add(number)
                values[path] = value
                break
        else:
            if default is _REQUIRED:
                listed = ", ".join(repr(pattern) for pattern, _ in rules)
                raise InputError(f"no rule matches {path!r}; the rules are {listed}: add a rule that covers the path")
            values[path] = default
    for number, (pattern, _) in enumerate(compiled):
        if number not in used:
            if any(pattern.fullmatch(path) for path in paths):
                raise InputError(f"rule {rules[number][0]!r} matches nothing: earlier rules match all of its paths")
            raise InputError(f"rule {rules[number][0]!r} matches nothing: {_expected(rules[number][0], paths)}")
    return values


def _regex(rule: str, paths: Collection[str]) -> str:
    """Return the regex over complete paths of a rule."""
    return rf"(?:.*/)?{rule}(?:/kernel)?" if re.fullmatch(r"[\w/-]+", rule) and rule not in paths else rule


def _expected(rule: str, paths: Sequence[str]) -> str:
    """Return the paths that a rule without a path could mean."""
    near = did_you_mean(rule, paths)
    kernels = [path for path in paths if path.endswith("/kernel")] or paths
    ends = list(dict.fromkeys(path.removesuffix("/kernel").rpartition("/")[2] for path in kernels))
    example = f", such as {kernels[0]!r}" if kernels and not near else ""
    return f"a rule must match a complete path{near or example}, or be the end of one: {', '.join(ends[:12])}"


def select(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return the paths that at least one pattern matches completely, in their order; raises `InputError` as `assign` does.

    Unlike rules, patterns may overlap; a pattern that matches nothing is still an error.
    """
    paths = list(paths)
    chosen: set[str] = set()
    for pattern in patterns:
        chosen.update(path for path, matches in assign([(pattern, True)], paths, default=False).items() if matches)
    return [path for path in paths if path in chosen]


def split(tree: Tree, paths: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``(chosen, rest)``: the tree of the leaves at ``paths``, and the tree of all other leaves."""
    flat, wanted = flatten(tree), set(paths)
    for path in wanted - flat.keys():
        get(tree, path)
    chosen = {path: leaf for path, leaf in flat.items() if path in wanted}
    return unflatten(chosen), unflatten({path: leaf for path, leaf in flat.items() if path not in wanted})


def join(*trees: Tree) -> dict[str, Any]:
    """Return the union of trees that share no path, the inverse of `split`; a shared path raises `InputError`."""
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise InputError(f"{path!r} is in two of the trees to join; each path may be in one tree only")
            flat[path] = leaf
    return unflatten(flat)


def map_at(function: Callable[..., Any], tree: Tree, *partials: Tree) -> dict[str, Any]:
    """Replace each leaf of ``tree`` at a path of ``partials[0]`` by ``function(leaf, *partial_leaves)``; keep other leaves.

    Raises `InputError` unless the partial trees have equal paths, all of them in ``tree``.
    """
    flat, parts = flatten(tree), [flatten(partial) for partial in partials]
    for part in parts:
        for path in part:
            if path not in flat:
                raise InputError(f"no {path!r} in the tree{did_you_mean(path, flat)}")
            if path not in parts[0]:
                raise InputError(f"{path!r} is in one of the partial trees and not in the first")
    return unflatten(flat | {path: function(flat[path], *(part[path] for part in parts)) for path in parts[0]})
