"""The ``tokenizer`` of a recipe: the sources of the vocabulary and of single tokens' embeddings."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dsee_jax.errors import InputError
from merge.method import Option
from merge.recipes import settings, strict_yaml
from merge.recipes.strict_yaml import shown


class Tokenizer(NamedTuple):
    """The source of the merged vocabulary."""

    source: str  # base, union, or the reference of a model
    # {token: {force, source}}; a source is a reference, {kind: zero} or {kind: model_token, model, token | token_id}
    tokens: Mapping[str, Mapping[str, Any]] = {}
    pad_to_multiple_of: int | None = None


_DONOR = ("model", "token", "token_id")


def read(where: str, raw: Any) -> Tokenizer:
    """Return the checked ``tokenizer`` of a recipe; raises `InputError`, beginning with ``where``, if ``raw`` is invalid."""
    if not isinstance(raw, dict):
        raise InputError(f"{where} is {shown(raw)}; expected source, tokens and pad_to_multiple_of")
    strict_yaml.check_keys(f"{where}.", raw, ("source", "tokens", "pad_to_multiple_of"))
    tokens = raw.get("tokens") or {}
    if not isinstance(tokens, dict):
        raise InputError(f"{where}.tokens is {shown(tokens)}; expected TOKEN: {{source: ...}}")
    multiple = raw.get("pad_to_multiple_of")
    if multiple is not None:
        multiple = settings.scalar(f"{where}.pad_to_multiple_of", multiple, Option(int, None, "", low=1, high=2**20))
    source = raw.get("source")
    return Tokenizer(
        "union" if source is None else strict_yaml.text(f"{where}.source", source),
        {token: _token(f"{where}.tokens.{shown(token)}", entry) for token, entry in tokens.items()},
        multiple,
    )


def _token(where: str, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InputError(f"{where} is {shown(raw)}; expected {{source: ..., force: ...}}")
    strict_yaml.check_keys(f"{where}.", raw, ("source", "force"))
    entry = {key: value for key, value in raw.items() if value is not None}
    if "force" in entry:
        entry["force"] = settings.scalar(f"{where}.force", entry["force"], Option(bool, False, ""))
    source = entry.get("source")
    if not isinstance(source, dict):
        return entry if source is None else {**entry, "source": strict_yaml.text(f"{where}.source", source)}
    kind = source.get("kind")
    if kind not in ("zero", "model_token"):
        raise InputError(f"{where}.source.kind is {shown(kind)}; expected zero or model_token")
    strict_yaml.check_keys(f"{where}.source.", source, ("kind",) if kind == "zero" else ("kind", *_DONOR))
    donor = {key: source[key] for key in _DONOR if source.get(key) is not None}
    if kind == "model_token" and (("token" in donor) == ("token_id" in donor) or "model" not in donor):
        raise InputError(f"{where}.source is incomplete or ambiguous; expected model, and either token or token_id")
    for key in donor.keys() - {"token_id"}:
        strict_yaml.text(f"{where}.source.{key}", donor[key])
    if "token_id" in donor:
        donor["token_id"] = settings.scalar(f"{where}.source.token_id", donor["token_id"], Option(int, None, "", low=0))
    return {**entry, "source": {"kind": kind, **donor}}
