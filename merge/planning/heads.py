"""Tied heads: an output matrix that is the token embedding, which some files hold twice and some once."""

from collections.abc import Mapping

from merge.inputs.lazies import Lazy
from merge.inputs.sources import Source
from merge.planning.rows import place

_EMBEDDINGS = ("embed", "wte")


def fitted(origin: Source, other: Source) -> tuple[Mapping[str, Lazy], list[str]]:
    """Return the tensors of ``other`` with its tied matrices stored as ``origin`` stores its own, and notes on what was done.

    A matrix that ``other`` lacks is its embedding, where its config ties them; one that ``origin`` lacks is left out where
    both configs do. Configs that say nothing tie, as in Hugging Face's format. Whatever else differs is left as it is.
    """
    found, notes = dict(other.tensors), []
    for name in _few(origin.tensors, other.tensors):
        partner = next((twin for twin in _twins(name, origin.tensors) if twin in other.tensors), None)
        if partner is not None and _tied(other):
            found[name] = other.tensors[partner]
            notes.append(f"{other.reference} does not store {name}: its {partner} is taken, to which it is tied")
    for name in _few(other.tensors, origin.tensors):
        partner = next((twin for twin in _twins(name, other.tensors) if twin in origin.tensors), None)
        if partner is not None and _tied(other) and _tied(origin):
            del found[name]
            notes.append(
                f"{other.reference} stores {name}, which is tied to {partner}; {origin.reference} does not: left out"
            )
    return found, notes


def _few(tensors: Mapping[str, Lazy], others: Mapping[str, Lazy]) -> list[str]:
    """The matrices outside the layers that only ``tensors`` has; none where they are many: such models differ otherwise."""
    names = [name for name in tensors if name not in others and len(tensors[name].shape) == 2 and place(name) is None]
    return names if len(names) <= 8 else []


def _tied(source: Source) -> bool:
    return source.config.get("tie_word_embeddings", True) is not False


def _twins(name: str, tensors: Mapping[str, Lazy]) -> list[str]:
    """What ``name`` may be tied to: matrices of its shape, outside the layers, one of the two an embedding by its name."""
    return [
        twin
        for twin, lazy in tensors.items()
        if lazy.shape == tensors[name].shape and place(twin) is None and _embedding(twin) != _embedding(name)
    ]


def _embedding(name: str) -> bool:
    return any(mark in name for mark in _EMBEDDINGS)
