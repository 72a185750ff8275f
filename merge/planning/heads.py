"""Heads that not all models have, such as classifiers tuned from a masked language model: one model's is kept, or none.

The bodies are merged. A head that only some models have, or of other shapes, has nothing to be merged with: the result has the
head, the class and the labels of one model.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dsee_jax.errors import InputError, did_you_mean
from merge.inputs import roles
from merge.inputs.lazy import Lazy
from merge.inputs.sources import Source

FIRST, DROP = "first", "drop"

_FIELDS = (
    "architectures",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "classifier_dropout",
)


class Separated(NamedTuple):
    """The models without the heads that are not merged."""

    views: dict[str, dict[str, Lazy]]  # the tensors of each model, by reference
    kept: dict[str, tuple[str, Lazy]]  # {name: (reference, tensor)} to copy
    fields: dict[str, Any]  # of config.json: the class and labels of the kept head; None: the field is left out
    warning: str  # one line, or empty


def separate(
    where: str,
    sources: Mapping[str, Source],
    views: Mapping[str, Mapping[str, Lazy]],
    models: Sequence[str],
    choice: str | None = None,
) -> Separated:
    """Return the models without the heads that differ, and the head to keep.

    Heads are separated that some models lack and whose models are of different classes, whose shapes differ, or whose labels
    do (``id2label``), and all heads under a ``choice``; poolers too.
    Other missing tensors remain.

    Args:
      where: the path of the recipe, for errors.
      sources: the opened models by reference, the one that gives the result's config first.
      views: their tensors.
      models: the references of the models without the base, in the recipe's order.
      choice: the reference of the model whose head is kept; ``first``: of the first of ``models`` that has one; ``drop``: no
        head; None: as ``first``, if the models are of different classes or the shapes differ.

    Raises:
      InputError: ``choice`` is no model of the recipe, or a model lacks a head that models of its class have.
    """
    if choice not in (None, FIRST, DROP, *sources):
        raise InputError(
            f"--heads is {choice!r}{did_you_mean(choice, sources)}; expected first, drop, or a model of {where}: "
            f"{', '.join([*sources][:8])}"
        )
    names = {reference: roles.heads(view) for reference, view in views.items()}
    differing = {
        _module(name)
        for reference in views
        for name in names[reference]
        if any(name not in view or _reshaped(name, view[name], views[reference][name]) for view in views.values())
    }
    if choice is not None or _other_labels(sources.values()):
        # Rows of equal shape that stand for other classes.
        every = {_module(name) for reference in views for name in names[reference] if not roles.of_tokens(name)}
        differing |= {module for module in every if not module.endswith("pooler")}
    if not differing:
        return Separated({reference: dict(view) for reference, view in views.items()}, {}, {}, "")
    heads = differing - {module for module in differing if module.endswith("pooler")}
    classes = {roles.architecture(source.config) for source in sources.values()}
    if choice is None and heads and len(classes) < 2:
        _check_present(where, views, names, heads)
    parted = {
        reference: {name: tensor for name, tensor in view.items() if not _within(name, names[reference], differing)}
        for reference, view in views.items()
    }
    order = [*models, *(reference for reference in sources if reference not in models)]
    donor = choice if choice in sources else None
    if donor is None and choice != DROP:
        donor = next((each for each in order if _has_head(sources[each], names[each], heads)), None)
    kept: dict[str, tuple[str, Lazy]] = {}
    for module in () if choice == DROP else sorted(differing):
        # A pooler belongs to the head; of bare models, it is the first's that has one.
        candidates = [donor] if heads or choice in sources else order
        owner = next((each for each in candidates if each and _of(views[each], names[each], module)), None)
        kept |= {name: (owner, views[owner][name]) for name in _of(views[owner], names[owner], module)} if owner else {}
    return Separated(parted, kept, _fields(sources, heads, donor), _warning(differing, kept))


def _other_labels(sources: Iterable[Source]) -> bool:
    """Return whether two models name one class differently; LABEL_0 ... says nothing."""
    named: dict[str, str] = {}
    for source in sources:
        labels = source.config.get("id2label")
        for key, label in labels.items() if isinstance(labels, dict) else ():
            text = str(label).casefold()
            if not re.fullmatch(r"label_\d+", text) and named.setdefault(str(key), text) != text:
                return True
    return False


def _module(name: str) -> str:
    """Return the module of a head: the first part of its name, or all parts to the pooler."""
    match = re.match(r".*?pooler(?=\.)", name)
    return match[0] if match else name.partition(".")[0]


def _has_head(source: Source, names: set[str], heads: set[str]) -> bool:
    """Return whether a model has one of the heads, or a head that is not stored, as it is tied."""
    return any(_within(name, names, heads) for name in names) or (
        roles.writes_text(source.config) and roles.is_tied(source.config)
    )


def _of(view: Mapping[str, Lazy], names: set[str], module: str) -> list[str]:
    return [name for name in view if name in names and _module(name) == module]


def _within(name: str, names: set[str], modules: set[str]) -> bool:
    return name in names and _module(name) in modules


def _reshaped(name: str, a: Lazy, b: Lazy) -> bool:
    """Return whether a head has other shapes in two models; rows of tokens are aligned by a tokenizer instead."""
    return a.shape != b.shape and not roles.of_tokens(name)


def _check_present(
    where: str, views: Mapping[str, Mapping[str, Lazy]], names: Mapping[str, set[str]], heads: set[str]
) -> None:
    for owner, view in views.items():
        for name in view:
            lacking = next((reference for reference, other in views.items() if name not in other), None)
            if lacking is not None and _within(name, names[owner], heads):
                raise InputError(
                    f"{where}: {lacking} lacks the tensor {name[:200]!r} of {owner}, and both are of one class; give "
                    f"--heads {owner} to copy it from {owner}, or --heads drop to leave it out"
                )


def _fields(sources: Mapping[str, Source], heads: set[str], donor: str | None) -> dict[str, Any]:
    first = next(iter(sources.values()))
    if not heads or donor == first.reference:
        return {}
    if donor is None:
        return roles.for_task(first.config, "Model")
    return {key: sources[donor].config.get(key) for key in _FIELDS if key in {*sources[donor].config, *first.config}}


def _warning(differing: set[str], kept: Mapping[str, tuple[str, Lazy]]) -> str:
    copied: dict[str, list[str]] = {}
    for module in sorted({_module(name) for name in kept}):
        owner = next(reference for name, (reference, _) in kept.items() if _module(name) == module)
        copied.setdefault(owner, []).append(module)
    outcomes = [f"{', '.join(modules)} copied from {owner}" for owner, modules in copied.items()]
    left = sorted(differing - {_module(name) for name in kept})
    if left:
        outcomes.append(f"{', '.join(left)} left out")
    return f"heads that differ, or whose classes do, are not merged: {'; '.join(outcomes)} (--heads chooses another)"
