"""Tied heads: an output matrix that equals the token embedding, which some checkpoints store twice and some once."""

from collections.abc import Mapping
from typing import NamedTuple

from merge.inputs import roles
from merge.inputs.lazy import Lazy, equal
from merge.inputs.sources import Source

_MOST = 8
"""Models in which more matrices outside the layers are missing differ in more than tied heads."""


class Fitted(NamedTuple):
    """The models with the same matrices that may be tied."""

    views: dict[str, dict[str, Lazy]]  # the tensors of each model, by reference
    untied: bool  # whether the result has an output matrix of its own, though the first model's is tied
    notes: list[str]


def fitted(sources: Mapping[str, Source]) -> Fitted:
    """Return the tensors of the models, the output matrix of each stored as the result needs it.

    A tied model that lacks the matrix has it in its embedding. If a model has a matrix of its own (its config does not tie),
    every model gets one, and the result is untied. If all are tied, the matrix is stored as in the first model. A config that
    does not say ties, as in Hugging Face's format. Other differences remain.

    Args:
      sources: the opened models by reference, the one that gives the result's config first.
    """
    views = {reference: dict(source.tensors) for reference, source in sources.items()}
    first = next(iter(sources.values()))
    untied, notes = False, _without_copies(views)
    for name in _unmatched(views):
        owners = [source for source in sources.values() if name in views[source.reference]]
        partners = {
            source.reference: partner
            for source in sources.values()
            if name not in views[source.reference]
            and roles.is_tied(source.config)
            and _same_class(source, owners)
            and (partner := _partner(name, views[owners[0].reference][name], views[source.reference]))
        }
        if len(partners) + len(owners) < len(sources):
            continue
        own = next((source for source in owners if not roles.is_tied(source.config)), None)
        if own is None and name not in views[first.reference]:
            for source in owners:
                del views[source.reference][name]
                notes.append(
                    f"{source.reference} stores {name}, which is tied to {partners[first.reference]}; "
                    f"{first.reference} does not: left out"
                )
            continue
        for reference, partner in partners.items():
            views[reference][name] = views[reference][partner]
            notes.append(f"{reference} does not store {name}: the tied {partner} is taken")
        if own is not None and roles.is_tied(first.config):
            untied = True
            notes.append(f"{own.reference} has {name} of its own: the result is not tied")
    for name in _stored_twice(sources, views):
        for view in views.values():
            del view[name]
        notes.append(f"{name} equals the tied embedding in every model: left out")
    return Fitted(views, untied, notes)


def _without_copies(views: dict[str, dict[str, Lazy]]) -> list[str]:
    """Delete the embeddings of encoder and decoder that repeat ``shared`` and that some models lack; return notes."""
    notes = []
    for reference, view in views.items():
        shared = view.get("shared.weight")
        names = [name for name in view if name.endswith(".embed_tokens.weight")] if shared else []
        for name in names:
            if shared and any(name not in other for other in views.values()) and equal(view[name], shared):
                del view[name]
                notes.append(f"{reference} stores {name}, which equals shared.weight: left out")
    return notes


def _stored_twice(sources: Mapping[str, Source], views: Mapping[str, Mapping[str, Lazy]]) -> list[str]:
    """Return the output matrices that all models store beside the embedding that they are tied to, with equal values."""
    if not all(roles.is_tied(source.config) for source in sources.values()):
        return []
    first = next(iter(sources.values()))
    size = roles.vocab_size(first.config)
    stored = views[first.reference]
    names = [name for name in stored if roles.is_matrix_of_tokens(name, stored[name], size, False)]
    return [name for name in names if all(name in view and _partner(name, view[name], view) for view in views.values())]


def _unmatched(views: Mapping[str, Mapping[str, Lazy]]) -> list[str]:
    """Return the matrices outside the layers that some models lack; none for more than `_MOST`: the models then differ."""
    names = {
        name: None
        for view in views.values()
        for name, tensor in view.items()
        if len(tensor.shape) == 2 and roles.outside_layers(name)
    }
    unmatched = [name for name in names if any(name not in view for view in views.values())]
    return unmatched if len(unmatched) <= _MOST else []


def _same_class(source: Source, owners: list[Source]) -> bool:
    """Return whether a model has an output matrix as its owners: it is of one of their classes, as far as configs say."""
    return roles.architecture(source.config) in {"", *(roles.architecture(owner.config) for owner in owners)}


def _partner(name: str, tensor: Lazy, view: Mapping[str, Lazy]) -> str | None:
    """Return the matrix that ``name`` may be tied to: of its shape, outside the layers, one of the two an embedding."""
    for candidate, lazy in view.items():
        shared = "shared" in (candidate.partition(".")[0], name.partition(".")[0])
        if (
            lazy.shape == tensor.shape
            and (shared or (roles.of_tokens(candidate) and roles.of_tokens(name)))
            and roles.outside_layers(candidate)
            and (shared or roles.is_embedding(candidate) != roles.is_embedding(name))
        ):
            return candidate
    return None
