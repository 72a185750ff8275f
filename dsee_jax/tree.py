"""Pytrees by path: flattening, replacing, ordered rules, selection, splitting.

The path of a leaf joins the keys above it by ``/``: ``encoder/layer_0/attention/query/kernel`` in nested dicts,
``layers/0/weight`` in lists, dataclasses, named tuples, Equinox modules and NNX states. A box (an ``AxisMetadata`` of Flax,
such as ``nn.Partitioned``, or an NNX variable) is read through: the path ends at the box, and a new value goes into a new
box of the same kind.

Rules are ``(regex, value)`` pairs, tried in order; a regex must match the complete path. A rule of plain text may also be the
end of a path, with or without its last part ``kernel``: ``query`` matches the path above. A rule without a leaf is an error,
and so is a leaf without a rule.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Array, Rules, Tree

_REQUIRED: Any = object()

T = TypeVar("T")


def _is_box(node: Any) -> bool:
    # Flax is not imported for this: a node can be a box only if Flax is imported already.
    meta = sys.modules.get("flax.core.meta")
    return (meta is not None and isinstance(node, meta.AxisMetadata)) or _is_variable(node)


def _is_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def unboxed(leaf: Any) -> Any:
    """Return the value in a box, or in boxes in boxes; other leaves are returned as they are."""
    while _is_box(leaf):
        leaf = leaf.unbox() if hasattr(leaf, "unbox") else leaf.get_value()
    return leaf


def reboxed(leaf: Any, value: Any) -> Any:
    """Return ``value`` in a new box like ``leaf``; ``value`` itself if ``leaf`` is no box."""
    if not _is_box(leaf):
        return value
    if hasattr(leaf, "unbox"):
        return leaf.replace_boxed(reboxed(leaf.unbox(), value))
    return leaf.replace(reboxed(leaf.get_value(), value))


def _leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], list[str], Any]:
    """Return ``{path: leaf}``, boxes kept, the path of every leaf of a pytree, and its structure.

    An NNX variable that several modules share is one leaf, at the first of its paths.
    """

    def stop(node: Any) -> bool:
        return _is_box(node) or (is_leaf is not None and node is not tree and is_leaf(node))

    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)
    flat: dict[str, Any] = {}
    shared: dict[int, str] = {}
    paths: list[str] = []
    for keys, leaf in pairs:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if _is_variable(leaf) and shared.setdefault(id(leaf), path) != path:
            path = shared[id(leaf)]
        elif path in flat:
            raise InputError(
                f"two leaves of the tree have the path {path!r}: rename a key, such as one that holds a '/'"
            )
        flat[path] = leaf
        paths.append(path)
    return flat, paths, structure


def flatten(tree: object, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return ``{path: leaf}`` of a pytree in JAX's order, boxes read through; a node that ``is_leaf`` accepts is a leaf."""
    return {path: unboxed(leaf) for path, leaf in _leaves(tree, is_leaf)[0].items()}


def arrays(tree: object) -> dict[str, Array]:
    """Return ``{path: array}`` of the leaves of a pytree that have a shape and a dtype; functions and strings are left out."""
    return {path: leaf for path, leaf in flatten(tree).items() if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}


def replace(tree: T, values: Mapping[str, Any]) -> T:
    """Return a pytree with the leaves at the paths of ``values`` replaced; its structure, containers and boxes are kept.

    Raises:
      InputError: a path of ``values`` is not in the tree.
    """
    flat, paths, structure = _leaves(tree)
    for path in values:
        lookup(flat, path)
    # A variable is changed in place by the modules that hold it: those of the given tree keep theirs.
    leaves = {
        path: reboxed(leaf, values[path]) if path in values else leaf.copy() if _is_variable(leaf) else leaf
        for path, leaf in flat.items()
    }
    return structure.unflatten([leaves[path] for path in paths])


def lookup(flat: Mapping[str, T], path: str) -> T:
    """Return the leaf at ``path`` of `flatten`; raises `InputError` with the nearest path if there is none."""
    if path not in flat:
        raise InputError(f"no {path!r} in the tree{did_you_mean(path, flat)}")
    return flat[path]


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dicts of ``{path: leaf}``; of nested dicts with keys of str, the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def get(tree: Tree, path: str) -> Any:
    """Return the leaf or subtree of nested dicts at ``path``; raises `InputError` with the nearest path if there is none."""
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
    """Return ``(chosen, rest)``: the tree of the leaves at ``paths``, and the tree of all other leaves.

    Raises:
      InputError: a path is not in the tree.
    """
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
