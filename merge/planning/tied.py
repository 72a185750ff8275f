"""Tied heads: an output matrix that equals the token embedding, which some checkpoints store twice and some once."""

from collections.abc import Mapping

from merge.inputs.lazy import Lazy
from merge.inputs.sources import Source
from merge.planning.matching import split_layer

_EMBEDDINGS = ("embed", "wte")


def fitted(origin: Source, other: Source) -> tuple[Mapping[str, Lazy], list[str]]:
    """Return the tensors of ``other`` with tied matrices stored as in ``origin``, and notes on the changes.

    A matrix that ``other`` lacks is taken from its embedding, if its config ties the two. A matrix that ``origin`` lacks is
    left out, if both configs tie. A config that does not say ties, as in Hugging Face's format. Other differences remain.
    """
    tensors, notes = dict(other.tensors), []
    for name in _missing_matrices(origin.tensors, other.tensors):
        partner = next(
            (candidate for candidate in _tied_candidates(name, origin.tensors) if candidate in other.tensors), None
        )
        if partner is not None and _tied(other):
            tensors[name] = other.tensors[partner]
            notes.append(f"{other.reference} does not store {name}: the tied {partner} is taken")
    for name in _missing_matrices(other.tensors, origin.tensors):
        partner = next(
            (candidate for candidate in _tied_candidates(name, other.tensors) if candidate in origin.tensors), None
        )
        if partner is not None and _tied(other) and _tied(origin):
            del tensors[name]
            notes.append(
                f"{other.reference} stores {name}, which is tied to {partner}; {origin.reference} does not: left out"
            )
    return tensors, notes


def _missing_matrices(tensors: Mapping[str, Lazy], others: Mapping[str, Lazy]) -> list[str]:
    """Return the matrices outside the layers that ``others`` lacks; none for more than 8, since the models then differ."""
    names = [
        name for name in tensors if name not in others and len(tensors[name].shape) == 2 and split_layer(name) is None
    ]
    return names if len(names) <= 8 else []


def _tied(source: Source) -> bool:
    return source.config.get("tie_word_embeddings", True) is not False


def _tied_candidates(name: str, tensors: Mapping[str, Lazy]) -> list[str]:
    """Return the matrices that ``name`` may be tied to: of the same shape, outside the layers, one of the two an embedding."""
    return [
        candidate
        for candidate, lazy in tensors.items()
        if lazy.shape == tensors[name].shape
        and split_layer(candidate) is None
        and _embedding(candidate) != _embedding(name)
    ]


def _embedding(name: str) -> bool:
    return any(mark in name for mark in _EMBEDDINGS)
