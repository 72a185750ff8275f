"""The ``tokenizer`` of a recipe: the sources of the vocabulary and of single tokens' embeddings."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dsee_jax.errors import InputError
from dsee_jax.runtime.strict_yaml import shown
from merge.method import Option
from merge.recipes import keys, reference, settings, values
from merge.recipes.keys import Notes


class Tokenizer(NamedTuple):
    """The source of the merged vocabulary."""

    source: str  # base, union, or the reference of a model
    # {token: {force, source}}; a source is a reference, {kind: zero} or {kind: model_token, model, token | token_id}
    tokens: Mapping[str, Mapping[str, Any]] = {}
    pad_to_multiple_of: int | None = None


_DONOR = ("model", "token", "token_id")


def read(where: str, raw: Any, notes: Notes) -> Tokenizer:
    """Return the checked ``tokenizer`` of a recipe.

    Args:
      where: recipe path, for errors.
      raw: the parsed YAML.
      notes: takes a note on each key that is ignored.

    Raises:
      InputError: ``raw`` is invalid; the message begins with ``where``.
    """
    name = f"{where}: tokenizer"
    if not isinstance(raw, dict):
        raise InputError(f"{name} is {shown(raw)}; expected source, tokens and pad_to_multiple_of")
    keys.check(where, raw, keys.TOKENIZER, notes, "tokenizer.")
    tokens = raw.get("tokens") or {}
    if not isinstance(tokens, dict):
        raise InputError(f"{name}.tokens is {shown(tokens)}; expected TOKEN: {{source: ...}}")
    multiple = raw.get("pad_to_multiple_of")
    if multiple is not None:
        multiple = settings.scalar(f"{name}.pad_to_multiple_of", multiple, Option(int, None, "", low=1, high=2**20))
    source = raw.get("source")
    return Tokenizer(
        "union" if source is None else reference.text(f"{name}.source", source),
        {token: _token(where, f"tokenizer.tokens.{shown(token)}", entry, notes) for token, entry in tokens.items()},
        multiple,
    )


def _token(where: str, path: str, raw: Any, notes: Notes) -> dict[str, Any]:
    name = f"{where}: {path}"
    if not isinstance(raw, dict):
        raise InputError(f"{name} is {shown(raw)}; expected {{source: ..., force: ...}}")
    keys.check(where, raw, ("source", "force"), notes, f"{path}.")
    entry = {key: value for key, value in raw.items() if value is not None}
    if "force" in entry:
        entry["force"] = settings.scalar(f"{name}.force", entry["force"], Option(bool, False, ""))
    source = entry.get("source")
    if not isinstance(source, dict) or "kind" not in source:
        return entry if source is None else {**entry, "source": reference.text(f"{name}.source", source)}
    kind = source["kind"]
    if kind not in ("zero", "model_token"):
        raise InputError(f"{name}.source.kind is {shown(kind)}; expected zero or model_token")
    keys.check(where, source, ("kind",) if kind == "zero" else ("kind", *_DONOR), notes, f"{path}.source.")
    donor = {key: source[key] for key in _DONOR if source.get(key) is not None}
    if kind == "model_token" and (("token" in donor) == ("token_id" in donor) or "model" not in donor):
        raise InputError(f"{name}.source is incomplete or ambiguous; expected model, and either token or token_id")
    if "model" in donor:
        donor["model"] = reference.text(f"{name}.source.model", donor["model"])
    if "token" in donor:
        values.text(f"{name}.source.token", donor["token"])
    if "token_id" in donor:
        donor["token_id"] = settings.scalar(f"{name}.source.token_id", donor["token_id"], Option(int, None, "", low=0))
    return {**entry, "source": {"kind": kind, **donor}}
