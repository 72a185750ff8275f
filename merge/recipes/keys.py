"""The keys of a recipe: those that are read, those without effect, and those of mergekit's other tools.

mergekit ignores each key that it does not read. Here a key that has a meaning elsewhere is ignored with a note, a key of
another tool is refused with the way to its result, and any other key is an error, since it may be a typing error.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime.strict_yaml import shown
from merge.mergekit_flags import FLAGS
from merge.methods import METHODS

TOP = ("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype")
TOP += ("tokenizer_source", "tokenizer", "chat_template", "seed")
MODULE = ("models", "slices", "parameters")
MODEL = ("model", "parameters", "statistics")
SLICE = ("sources", "base_model", "parameters")
SOURCE = ("model", "layer_range", "parameters", "statistics")
TOKENIZER = ("source", "tokens", "pad_to_multiple_of")

LABELS = ("name", "description", "author", "license", "tags")
"""Keys at the top that say something to the reader."""

OPTIONS = frozenset(key for method in METHODS.values() for key in (*method.each, *method.shared))
"""The parameters of all methods."""

KNOWN = {*TOP, *MODEL, *SLICE, *SOURCE, *OPTIONS, *FLAGS, "residual_weight"}
"""The keys that have a meaning somewhere in a recipe."""

_MOE = "mergekit-moe, which builds a mixture of experts"
_EVOLVE = "mergekit-evolve, which searches for a recipe"
_TOOLS = {
    **dict.fromkeys(("gate_mode", "experts", "experts_per_token", "shared_experts"), _MOE),
    "genome": _EVOLVE,
    **dict.fromkeys(("layer_slices", "embedding_source", "lm_head_source"), "bakllama, which stacks layers"),
    **dict.fromkeys(("donor", "approximation_method"), "mergekit-tokensurgeon, which transplants a tokenizer"),
}
_INSTEAD = {
    "genome": "run it with mergekit-evolve, and merge by the recipe that it writes",
    "layer_slices": "write the layers as slices, with merge_method: passthrough",
}
_REFUSED = {"input_model_parameters": "it is not supported (mergekit dropped it); write parameters beside each model"}


class Notes(list[str]):
    """Remarks for the user, each one line on something without effect."""

    def ignored(self, what: str, reason: str) -> None:
        """Add a remark on something that is ignored, once."""
        if (line := f"{what} has no effect: {reason}") not in self:
            self.append(line)


def check(where: str, raw: Mapping[str, Any], keys: Collection[str], notes: Notes, path: str = "") -> None:
    """Check the keys of a mapping of the recipe.

    Args:
      where: the recipe's path, for errors.
      raw: the mapping.
      keys: those that are read.
      notes: takes a note on each key that has a meaning elsewhere.
      path: the mapping's key path, with a dot at its end, or empty for the top.

    Raises:
      InputError: a key of another tool, or an unknown key; the message begins with ``where``.
    """
    for key in raw:
        name = f"{where}: {path}{shown(key)[1:-1]}"
        if not path and key in _TOOLS:
            way = _INSTEAD.get(key, "run it there; its OUT_DIR can then be a model of a recipe")
            raise InputError(f"{name} belongs to a recipe of {_TOOLS[key]}; it is not supported here: {way}")
        if key in _REFUSED:
            raise InputError(f"{name}: {_REFUSED[key]}")
    for key in raw:
        if key in keys or (not path and key in LABELS):
            continue
        if key not in KNOWN:
            near = did_you_mean(key[:100], keys)
            raise InputError(f"{where}: {path}{shown(key)[1:-1]} is unknown{near}; expected {', '.join(keys)}")
        if key in OPTIONS:
            notes.ignored(f"{path}{key}", "parameters of the method stand under 'parameters:'")
        elif key in FLAGS:
            notes.ignored(f"{path}{key}", "it is a flag of mergekit-yaml, not a key of a recipe")
        else:
            notes.ignored(f"{path}{key}", "mergekit ignores it here too")


def unused(places: Mapping[str, Sequence[str]], method: str, notes: Notes) -> None:
    """Note parameters that the method does not use; ``places`` lists the key paths of each.

    A key of the recipe's top among the parameters is named with its place.
    """
    for key, paths in places.items():
        listed = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        own = "it stands at the top of a recipe" if key in TOP and key not in OPTIONS else f"{method} does not use it"
        notes.ignored(f"{key} in {listed}", own)
