"""Matching the models' tensors to the result's tensors: by name, or with slices layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.hf_layout import split_layer
from dsee_jax.runtime.strict_yaml import shown
from merge.inputs import roles
from merge.recipes.recipe import Recipe, Slice

_ADVICE = "merge models with the same tensors: open and save all with one class"

Names: TypeAlias = Mapping[str, Any]
"""The tensors of one model, by name."""


class Row(NamedTuple):
    """One tensor of the result."""

    name: str
    part: Slice
    names: tuple[str, ...]  # the tensor's name in each of the slice's inputs
    t: float  # position on a gradient: 0 in the slice's first layer and outside the layers, 1 in its last layer


def rows(recipe: Recipe, views: Mapping[str, Names]) -> Iterator[Row]:
    """Yield the result's tensors; with slices, the tensors before, in and after the layers, in this order.

    Args:
      recipe: the recipe.
      views: the tensors of each model, by reference.

    Raises:
      InputError: a model lacks a tensor or layer, or has an extra tensor.
    """
    yield from _by_layer(recipe, views) if recipe.sliced else _by_name(recipe, views)


def _length(part: Slice) -> int:
    start, stop = part.inputs[0].layers or (0, 0)
    return stop - start


def _by_name(recipe: Recipe, views: Mapping[str, Names]) -> Iterator[Row]:
    part = recipe.slices[0]
    inputs = [entry.model for entry in part.inputs]
    first = recipe.origin if recipe.origin in inputs else inputs[0]
    _same_names(
        recipe, part, first, {name: name for name in views[first]}, [_keyed_by_name(views[model]) for model in inputs]
    )
    positions = {name: split_layer(name) for name in views[first]}
    depths: dict[str, int] = {}
    for position in positions.values():
        if position is not None:
            depths[position[0]] = max(depths.get(position[0], 0), position[1] + 1)
    for name, position in positions.items():
        t = 0.0 if position is None else _gradient_position(position[1], depths[position[0]])
        yield Row(name, part, (name,) * len(inputs), t)


def _by_layer(recipe: Recipe, views: Mapping[str, Names]) -> Iterator[Row]:
    layers = {entry.model: _layers(recipe, entry.model, views) for part in recipe.slices for entry in part.inputs}
    yield from _outside(recipe, recipe.slices[0], views, first=True)
    number = 0
    for part in recipe.slices:
        for offset in range(_length(part)):
            members = []
            for entry in part.inputs:
                wanted, present = (entry.layers or (0, 0))[0] + offset, layers[entry.model]
                if wanted not in present:
                    raise InputError(
                        f"{recipe.path}: {entry.key}.layer_range is {list(entry.layers or ())}; {entry.model} has the "
                        f"layers {min(present)} to {max(present)}, so write at most [{min(present)}, {max(present) + 1}]"
                    )
                members.append(present[wanted])
            _same_names(recipe, part, part.inputs[0].model, members[0], members)
            for before, after in members[0]:
                names = tuple(member[before, after] for member in members)
                yield Row(f"{before}{number}{after}", part, names, _gradient_position(offset, _length(part)))
            number += 1
    yield from _outside(recipe, recipe.slices[-1], views, first=False)


def _outside(recipe: Recipe, part: Slice, views: Mapping[str, Names], *, first: bool) -> Iterator[Row]:
    """Yield the tensors before the layers, or else the tensors after the layers."""
    members = [
        _keyed_by_name(
            name for name in views[entry.model] if split_layer(name) is None and roles.before_layers(name) == first
        )
        for entry in part.inputs
    ]
    _same_names(recipe, part, part.inputs[0].model, members[0], members)
    for name in members[0]:
        yield Row(name, part, (name,) * len(part.inputs), 0.0)


def _keyed_by_name(names: Any) -> dict[Any, str]:
    return {name: name for name in names}


def _layers(recipe: Recipe, model: str, views: Mapping[str, Names]) -> dict[int, dict[Any, str]]:
    """Return ``{number: {(before, after): name}}`` of a model with one stack of layers."""
    layers: dict[int, dict[Any, str]] = {}
    stacks: dict[str, None] = {}
    for name in views[model]:
        if position := split_layer(name):
            before, number, after = position
            layers.setdefault(number, {})[before, after] = name
            stacks[before] = None
    if len(stacks) != 1:
        listed = ", ".join([*stacks][:3]) or "no numbered layers"
        raise InputError(
            f"{recipe.path}: slices: {model} has {listed}; expected one stack of numbered layers: use 'models'"
        )
    return layers


def _same_names(
    recipe: Recipe, part: Slice, first: str, expected: Mapping[Any, str], members: Sequence[Mapping[Any, str]]
) -> None:
    for entry, member in zip(part.inputs, members, strict=True):
        where = f"{recipe.path}: {entry.key}: {entry.model}"
        lacking = [name for key, name in expected.items() if key not in member]
        surplus = [name for key, name in member.items() if key not in expected]
        if lacking:
            near = did_you_mean(lacking[0][:200], [other for other in [*member.values()][:2000] if len(other) < 200])
            raise InputError(f"{where} lacks the tensor {_listed(lacking)} of {first}{near}; {_ADVICE}")
        if surplus:
            raise InputError(f"{where} has the tensor {_listed(surplus)}, which {first} lacks; {_ADVICE}")


def _listed(names: Sequence[str]) -> str:
    return shown(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _gradient_position(number: int, count: int) -> float:
    return number / (count - 1) if count > 1 else 1.0
