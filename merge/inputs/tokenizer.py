"""The tokenizer of a merged model, and embeddings aligned by token: mergekit's ``tokenizer_source`` and ``tokenizer``.

Where models have different vocabularies, row 7 of one embedding and row 7 of another are different tokens. Here the rows of
every vocabulary tensor are put in the order of the merged tokenizer before a method sees them. A model that lacks a token
gets its row from the base, else from the only model that has it, else the mean of those that have it, else zeros.
"""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.stores import Place
from merge.inputs import lazies
from merge.inputs.lazies import Lazy
from merge.inputs.sources import Source, located

log = logging.getLogger(__name__)

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_NAMES = r"(?:.*\.)?(?:\w*embed\w*|wte|shared|\w*lm_head|decoder|predictions|vocab_projector|output)\.(?:weight|bias)"
_NOT_TOKENS = r".*(?:position|token_type|segment|patch).*"


class Vocabulary(NamedTuple):
    """The tokens of the merged model."""

    tokenizer: Any  # of transformers
    tokens: Mapping[str, int]  # the row of each token
    base: str | None  # whose rows models take that lack a token
    known: int  # rows up to the last token
    rows: int  # with the padding; the vocab_size of the merged model
    owned: Mapping[str, np.ndarray]  # {reference: int64 (known,)}: the row of each token in that model, -1: none
    given: Mapping[int, tuple[str, int] | None]  # {row: (reference, row in it)} from the recipe; None: zeros
    forced: frozenset[int]  # rows that take what is given even in models that have the token


def vocab_size(source: Source) -> int | None:
    """Return how many rows a model's config gives its embedding, or None where it does not say."""
    inner = source.config.get("text_config")
    found = source.config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return found if isinstance(found, int) and found > 0 else None


def is_vocabulary(name: str, lazy: Lazy, size: int | None) -> bool:
    """Say whether the rows of a tensor are tokens: it is named as an embedding or a head is and has one for each token."""
    named = re.fullmatch(_NAMES, name) and not re.fullmatch(_NOT_TOKENS, name)
    return bool(named) and bool(lazy.shape) and lazy.shape[0] == size


def check(sources: Sequence[Source]) -> None:
    """Refuse models whose vocabularies differ in size; warn where a row is another token in another model.

    For recipes that say nothing of the tokenizer.

    Raises:
      InputError: two models of different ``vocab_size``.
    """
    first = sources[0]
    for other in sources[1:]:
        sizes = vocab_size(first), vocab_size(other)
        if None not in sizes and sizes[0] != sizes[1]:
            raise InputError(
                f"vocabularies differ: {first.reference!r} has vocab_size {sizes[0]} and {other.reference!r} {sizes[1]}; "
                "align them by token with 'tokenizer_source: base' or 'tokenizer_source: union' in the recipe"
            )
        files = [source.folder / "tokenizer.json" for source in (first, other)]
        if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
            ours, theirs = ({row: token for token, row in _opened(file.parent).get_vocab().items()} for file in files)
            differ = sorted(row for row in ours.keys() & theirs.keys() if ours[row] != theirs[row])
            if differ:
                row = differ[0]
                log.warning(
                    "%d rows are other tokens in %s than in %s, and are merged as they stand: row %d is %r and %r; "
                    "tokenizer_source would align them",
                    *(len(differ), other.reference, first.reference, row, theirs[row], ours[row]),
                )


def build(
    choice: str,
    sources: Sequence[Source],
    beside: Place,
    *,
    base: str | None = None,
    tokens: Mapping[str, Mapping[str, Any]] | None = None,
    pad_to_multiple_of: int | None = None,
) -> Vocabulary:
    """Decide the merged model's tokens.

    Args:
      choice: ``base``, ``union`` (the base's tokens, then those that only others have, in the order of the models and of
        their rows), or a model reference.
      sources: all models, the base among them.
      beside: the folder of the recipe.
      base: the reference of the base; None: no base, and ``base`` and ``union`` start from the first model's tokenizer.
      tokens: ``{token: {source, force}}`` from the recipe: where the row of a token comes from in models that lack it, with
        ``force`` in all. A source is a model, ``{kind: zero}`` or ``{kind: model_token, model, token | token_id}``.
      pad_to_multiple_of: round the rows up to a multiple of this.

    Raises:
      InputError: no tokenizer where one is needed, or a token, model or row that there is not.
    """
    named = {source.reference: source for source in sources}
    first = named[base] if base is not None else sources[0]
    others = [source for source in sources if source is not first]
    out = _stripped(first)
    vocabularies = {first.reference: _fitting(out.get_vocab(), first)}
    added = {first.reference: out.added_tokens_decoder}
    for source in others:
        if any((source.folder / name).exists() for name in _VOCABULARIES):
            opened = _opened(source.folder)
            vocabularies[source.reference] = _fitting(opened.get_vocab(), source)
            added[source.reference] = opened.added_tokens_decoder
        else:
            log.warning("%s has no tokenizer: taken to be that of %s", source.reference, first.reference)
            vocabularies[source.reference] = _fitting(vocabularies[first.reference], source)
            added[source.reference] = {}
    if choice == "union":
        _unite(out, vocabularies, added)
    elif choice != "base":
        out = _opened(located(choice, beside)[1])
    for token in tokens or {}:
        if token not in out.get_vocab():
            out.add_tokens(token)
    final = out.get_vocab()
    known = max(final.values()) + 1
    step = pad_to_multiple_of or 1
    owned = {}
    for reference, vocabulary in vocabularies.items():
        owned[reference] = np.full(known, -1, np.int64)
        for token, row in final.items():
            owned[reference][row] = vocabulary.get(token, -1)
    rules = {token: entry for token, entry in (tokens or {}).items() if entry.get("source") or entry.get("force")}
    given = {final[token]: _given(token, entry, named, vocabularies) for token, entry in rules.items()}
    forced = frozenset(final[token] for token, entry in rules.items() if entry.get("force"))
    return Vocabulary(out, final, base, known, -(-known // step) * step, owned, given, forced)


def _opened(folder: Path) -> Any:
    # Its advice to install PyTorch is none to a program that only needs the tokenizer; it is given at the import.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # a malformed tokenizer.json is a bare Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no tokenizer in {folder}; expected tokenizer.json and its like there ({reason})") from None


def _fitting(vocabulary: Mapping[str, int], source: Source) -> dict[str, int]:
    """Return the tokens that have a row in the model, by row."""
    size = vocab_size(source) or len(vocabulary)
    return {token: row for token, row in sorted(vocabulary.items(), key=lambda pair: pair[1]) if row < size}


def _stripped(source: Source) -> Any:
    """Return a model's tokenizer without the tokens that have no row in the model."""
    opened = _opened(source.folder)
    fitting = _fitting(opened.get_vocab(), source)
    spare = opened.get_vocab().keys() - fitting.keys()
    if not spare:
        return opened
    from tokenizers import Tokenizer

    fields = json.loads(opened.backend_tokenizer.to_str())
    inner = fields["model"]["vocab"]
    if fields["model"]["type"] != "BPE" and spare & set(inner):
        raise InputError(
            f"{source.folder}: the tokenizer has {len(spare)} tokens more than the model's {len(fitting)} rows: "
            "cut the tokenizer, or name another model as tokenizer_source"
        )
    fields["added_tokens"] = [entry for entry in fields["added_tokens"] if entry["content"] not in spare]
    if fields["model"]["type"] == "BPE":
        fields["model"]["vocab"] = {token: row for token, row in inner.items() if token not in spare}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in fields["model"]["merges"])
        fields["model"]["merges"] = [pair for pair in pairs if not spare & {*pair, "".join(pair)}]
    for role, token in list(opened.special_tokens_map.items()):
        if isinstance(token, str) and token in spare:
            setattr(opened, role, None)
    opened._tokenizer = Tokenizer.from_str(json.dumps(fields))
    return opened


def _unite(out: Any, vocabularies: Mapping[str, Mapping[str, int]], added: Mapping[str, Mapping[int, Any]]) -> None:
    """Add to a tokenizer the tokens that others have: plain ones first, then those that were added to others too."""
    present, special = set(out.get_vocab()), {}
    for reference, vocabulary in vocabularies.items():
        kept = {info.content: info for _, info in sorted(added[reference].items()) if info.content in vocabulary}
        special |= {token: info for token, info in kept.items() if token not in special}
    for vocabulary in vocabularies.values():
        fresh = [token for token in vocabulary if token not in present and token not in special]
        out.add_tokens(fresh)
        present.update(fresh)
    out.add_tokens([info for token, info in special.items() if token not in present])


def _given(
    token: str, entry: Mapping[str, Any], named: Mapping[str, Source], vocabularies: Mapping[str, Mapping[str, int]]
) -> tuple[str, int] | None:
    """Return the model and row that a recipe names for a token, None for zeros."""
    where, source = f"tokenizer.tokens.{token}.source", entry.get("source")
    wanted: Mapping[str, Any] = source if isinstance(source, Mapping) else {}
    if isinstance(source, str):
        wanted = {"kind": "model_token", "model": source, "token": token}
    if wanted == {"kind": "zero"}:
        return None
    if (
        wanted.keys() not in ({"kind", "model", "token"}, {"kind", "model", "token_id"})
        or wanted["kind"] != "model_token"
    ):
        raise InputError(
            f"{where} is {source!r}; expected a model, {{kind: zero}} or {{kind: model_token, model: ..., token: ...}} "
            "(or token_id)"
        )
    model = wanted["model"]
    if model not in named:
        raise InputError(f"{where}: {model!r} is no model of the recipe{did_you_mean(str(model), named)}")
    vocabulary = vocabularies[model]
    if "token" in wanted:
        if wanted["token"] not in vocabulary:
            near = did_you_mean(str(wanted["token"]), vocabulary)
            raise InputError(f"{where}: {model!r} has no token {wanted['token']!r}{near}")
        return model, vocabulary[wanted["token"]]
    row, size = wanted["token_id"], vocab_size(named[model]) or len(vocabulary)
    if not isinstance(row, int) or not 0 <= row < size:
        raise InputError(f"{where}: token_id is {row!r}; {model!r} has rows 0 to {size - 1}")
    return model, row


def align(vocabulary: Vocabulary, sources: Sequence[Source]) -> list[Source]:
    """Return the models with the rows of their vocabulary tensors in the order of the merged tokens.

    Args:
      vocabulary: from `build`.
      sources: as for `build`.

    Raises:
      InputError: a tensor has rows of different shape in two models, or none in a model that the recipe takes a row from.
    """
    owners: dict[str, dict[str, Lazy]] = {}
    for source in sources:
        for name, lazy in source.tensors.items():
            if is_vocabulary(name, lazy, vocab_size(source)):
                owners.setdefault(name, {})[source.reference] = lazy
    changed = {name: _aligned(name, vocabulary, models) for name, models in owners.items()}
    found = []
    for source in sources:
        mine = {name: new[source.reference] for name, new in changed.items() if source.reference in new}
        found.append(source._replace(tensors={**source.tensors, **mine}))
    return found


def _aligned(name: str, vocabulary: Vocabulary, models: Mapping[str, Lazy]) -> dict[str, Lazy]:
    first = next(iter(models))
    for reference, lazy in models.items():
        if lazy.shape[1:] != models[first].shape[1:]:
            raise InputError(
                f"{name!r} is {models[first].shape} in {first!r} and {lazy.shape} in {reference!r}: only the number of rows "
                "may differ"
            )
    old = {reference: vocabulary.owned[reference].copy() for reference in models}
    forced = sorted(vocabulary.forced)
    lacking = np.any([rows < 0 for rows in old.values()], axis=0)
    lacking[forced] = True
    fills: dict[int, list[tuple[Lazy, int]]] = {}
    for row in np.flatnonzero(lacking).tolist():
        if row in vocabulary.given:
            given = vocabulary.given[row]
            if given is not None and given[0] not in models:
                raise InputError(
                    f"the recipe takes a token's row of {name!r} from {given[0]!r}, which has no such tensor"
                )
            fills[row] = [] if given is None else [(models[given[0]], given[1])]
            continue
        having = [reference for reference in models if old[reference][row] >= 0]
        chosen = [reference for reference in having if reference == vocabulary.base] or having
        fills[row] = [(models[reference], int(old[reference][row])) for reference in chosen]
    padding = np.full(vocabulary.rows - vocabulary.known, -1, np.int64)
    for rows in old.values():
        rows[forced] = -1
    return {
        reference: lazies.aligned(lazy, np.concatenate([old[reference], padding]), fills, vocabulary.known)
        for reference, lazy in models.items()
    }
