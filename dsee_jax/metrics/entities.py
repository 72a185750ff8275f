"""Metrics of tagged words: the F1 score of entities as in the CoNLL shared tasks, and the accuracy of tags.

Tags of entities are IOB2: ``B-TYPE`` begins an entity, ``I-TYPE`` is inside it, ``O`` is outside of all.
"""

from collections.abc import Sequence

import numpy as np

from dsee_jax.errors import InputError


def is_iob(names: Sequence[str]) -> bool:
    """Return whether tags mark entities; those of other tags, such as parts of speech, have their accuracy only.

    Raises:
      InputError: some tags mark entities by B- or I-, and others are none of IOB2.
    """
    marked = [name[:2] in ("B-", "I-") and len(name) > 2 for name in names]
    if not any(marked) or "O" not in names:
        return False
    if other := [name for name, fits in zip(names, marked, strict=True) if not fits and name != "O"]:
        raise InputError(
            f"the tag {other[0]!r} is not of IOB2; expected O, B-TYPE and I-TYPE: write the tags of entities as IOB2"
        )
    return True


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities ``(type, start, end)`` of a text; ``end`` is exclusive.

    As in conlleval of CoNLL-2000 (Tjong Kim Sang and Buchholz), an ``I-TYPE`` that continues no entity of its type begins one.
    """
    spans, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        if prefix == "I" and own == kind:
            continue
        if kind:
            spans.add((kind, start, place))
        start, kind = place, own
    return spans


def score(predicted: Sequence[np.ndarray], given: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """Return f1, precision, recall and accuracy, or accuracy alone where the tags mark no entities; the first decides.

    An entity is right where its type, its start and its end are. The counts are over all texts together; a ratio of nothing
    is 0. The accuracy is the fraction of words with the right tag.

    Args:
      predicted: the tags of each text, int indices into ``names``.
      given: the right tags, of the same lengths.
      names: the tags.
    """
    accuracy = {"accuracy": float(np.mean(np.concatenate(predicted) == np.concatenate(given)))}
    if not is_iob(names):
        return accuracy
    right, found, present = 0, 0, 0
    for one, other in zip(predicted, given, strict=True):
        own, true = (entities([str(names[tag]) for tag in tags]) for tags in (one, other))
        right, found, present = right + len(own & true), found + len(own), present + len(true)
    ratios = {
        "f1": 2 * right / max(found + present, 1),
        "precision": right / max(found, 1),
        "recall": right / max(present, 1),
    }
    return ratios | accuracy
