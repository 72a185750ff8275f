"""The tokenizer of a merged model, and embeddings aligned by token, for mergekit's ``tokenizer_source`` and ``tokenizer``.

If vocabularies differ, the same row of two embeddings stands for different tokens. This module puts the rows of every
vocabulary tensor in the order of the merged tokenizer before a method reads them. A model that lacks a token gets the token's
row from the base, else from the only model with the token, else the mean over the models with the token, else zeros.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt.tokenizer import has_vocabulary, load_tokenizer
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime.storage import Place
from merge.inputs import lazy
from merge.inputs.lazy import Lazy
from merge.inputs.roles import is_embedding, is_matrix_of_tokens, is_tied, is_vocabulary, vocab_size
from merge.inputs.sources import Source, located

log = logging.getLogger(__name__)


class Vocabulary(NamedTuple):
    """The tokens of the merged model."""

    tokenizer: Any  # of transformers
    tokens: Mapping[str, int]  # the row of each token
    base: str | None  # reference of the model whose rows replace missing rows
    token_rows: int  # number of rows up to the last token
    rows: int  # number of rows with padding: the vocab_size of the merged model
    row_of: Mapping[str, np.ndarray]  # {reference: int64 (token_rows,)}: the row of each token in that model, -1: none
    donors: Mapping[int, tuple[str, int] | None]  # {row: (reference, row in that model)} from the recipe; None: zeros
    forced: frozenset[int]  # rows that are taken from the donor even in models that have the token


def check(sources: Sequence[Source]) -> None:
    """Raise for vocabularies of different sizes; warn if a row stands for different tokens in two models.

    Recipes without a tokenizer are checked so.

    Raises:
      InputError: two models of different ``vocab_size``.
    """
    first = sources[0]
    for other in sources[1:]:
        sizes = vocab_size(first.config), vocab_size(other.config)
        if None not in sizes and sizes[0] != sizes[1]:
            raise InputError(
                f"vocabularies differ: {first.reference!r} has vocab_size {sizes[0]} and {other.reference!r} {sizes[1]}; "
                "align them by token with 'tokenizer_source: base' or 'tokenizer_source: union' in the recipe"
            )
        files = [source.tokenizer / "tokenizer.json" for source in (first, other)]
        if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
            try:
                ours, theirs = (
                    {row: token for token, row in load_tokenizer(file.parent).get_vocab().items()} for file in files
                )
            except InputError as error:
                log.warning("the tokens of %s and %s are not compared: %s", first.reference, other.reference, error)
                continue
            differ = sorted(row for row in ours.keys() & theirs.keys() if ours[row] != theirs[row])
            if differ:
                row = differ[0]
                log.warning(
                    "%d rows stand for different tokens in %s and %s, and are merged row by row: row %d is %r and %r; "
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
    """Return the merged model's vocabulary.

    Args:
      choice: ``base``, ``union`` (the base's tokens, then the other models' tokens, in the order of the models and of their
        rows), or a model reference.
      sources: all models, the base among them.
      beside: the folder of the recipe.
      base: the reference of the base; None: no base, and ``base`` and ``union`` start from the first model's tokenizer.
      tokens: ``{token: {source, force}}`` from the recipe: the source of a token's row in models that lack the token, with
        ``force`` in all models. A source is a model, ``{kind: zero}`` or ``{kind: model_token, model, token | token_id}``.
      pad_to_multiple_of: round the number of rows up to a multiple of this.

    Raises:
      InputError: a tokenizer, token, model or row does not exist.
    """
    named = {source.reference: source for source in sources}
    first = named[base] if base is not None else sources[0]
    others = [source for source in sources if source is not first]
    out = _stripped(first)
    vocabularies = {first.reference: _fitting(out.get_vocab(), first)}
    added = {first.reference: out.added_tokens_decoder}
    for source in others:
        if has_vocabulary(source.tokenizer):
            opened = load_tokenizer(source.tokenizer)
            vocabularies[source.reference] = _fitting(opened.get_vocab(), source)
            added[source.reference] = opened.added_tokens_decoder
        else:
            log.warning("%s has no tokenizer: the tokenizer of %s is taken", source.reference, first.reference)
            vocabularies[source.reference] = _fitting(vocabularies[first.reference], source)
            added[source.reference] = {}
    if choice == "union":
        _unite(out, vocabularies, added)
    elif choice != "base":
        out = load_tokenizer(located(choice, beside)[1])
    for token in tokens or {}:
        if token not in out.get_vocab():
            out.add_tokens(token)
    final = out.get_vocab()
    token_rows = max(final.values()) + 1
    step = pad_to_multiple_of or 1
    row_of = {}
    for reference, vocabulary in vocabularies.items():
        row_of[reference] = np.full(token_rows, -1, np.int64)
        for token, row in final.items():
            row_of[reference][row] = vocabulary.get(token, -1)
    rules = {token: entry for token, entry in (tokens or {}).items() if entry.get("source") or entry.get("force")}
    donors = {final[token]: _donor(token, entry, named, vocabularies) for token, entry in rules.items()}
    forced = frozenset(final[token] for token, entry in rules.items() if entry.get("force"))
    return Vocabulary(out, final, base, token_rows, -(-token_rows // step) * step, row_of, donors, forced)


def _fitting(vocabulary: Mapping[str, int], source: Source) -> dict[str, int]:
    """Return the tokens that have a row in the model, ordered by row."""
    size = vocab_size(source.config) or len(vocabulary)
    return {token: row for token, row in sorted(vocabulary.items(), key=lambda pair: pair[1]) if row < size}


def _stripped(source: Source) -> Any:
    """Return a model's tokenizer without the tokens that have no row in the model."""
    opened = load_tokenizer(source.tokenizer)
    fitting = _fitting(opened.get_vocab(), source)
    surplus = opened.get_vocab().keys() - fitting.keys()
    if not surplus:
        return opened
    from tokenizers import Tokenizer

    fields = json.loads(opened.backend_tokenizer.to_str())
    inner = fields["model"]["vocab"]
    if fields["model"]["type"] != "BPE" and surplus & set(inner):
        raise InputError(
            f"{source.tokenizer}: the tokenizer has {len(surplus)} tokens more than the model's {len(fitting)} rows: "
            "remove the tokens, or name another model as tokenizer_source"
        )
    fields["added_tokens"] = [entry for entry in fields["added_tokens"] if entry["content"] not in surplus]
    if fields["model"]["type"] == "BPE":
        fields["model"]["vocab"] = {token: row for token, row in inner.items() if token not in surplus}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in fields["model"]["merges"])
        fields["model"]["merges"] = [pair for pair in pairs if not surplus & {*pair, "".join(pair)}]
    for role, token in list(opened.special_tokens_map.items()):
        if isinstance(token, str) and token in surplus:
            setattr(opened, role, None)
    opened._tokenizer = Tokenizer.from_str(json.dumps(fields))
    return opened


def _unite(out: Any, vocabularies: Mapping[str, Mapping[str, int]], added: Mapping[str, Mapping[int, Any]]) -> None:
    """Add the tokens of the other tokenizers to ``out``: plain tokens first, then their added tokens."""
    present, special = set(out.get_vocab()), {}
    for reference, vocabulary in vocabularies.items():
        usable = {info.content: info for _, info in sorted(added[reference].items()) if info.content in vocabulary}
        special |= {token: info for token, info in usable.items() if token not in special}
    for vocabulary in vocabularies.values():
        fresh = [token for token in vocabulary if token not in present and token not in special]
        out.add_tokens(fresh)
        present.update(fresh)
    out.add_tokens([info for token, info in special.items() if token not in present])


def _donor(
    token: str, entry: Mapping[str, Any], named: Mapping[str, Source], vocabularies: Mapping[str, Mapping[str, int]]
) -> tuple[str, int] | None:
    """Return the model and row that the recipe names for a token; None for zeros."""
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
        raise InputError(f"{where}: {model!r} is not a model of the recipe{did_you_mean(str(model), named)}")
    vocabulary = vocabularies[model]
    if "token" in wanted:
        if wanted["token"] not in vocabulary:
            near = did_you_mean(str(wanted["token"]), vocabulary)
            raise InputError(f"{where}: {model!r} has no token {wanted['token']!r}{near}")
        return model, vocabulary[wanted["token"]]
    row, size = wanted["token_id"], vocab_size(named[model].config) or len(vocabulary)
    if not isinstance(row, int) or not 0 <= row < size:
        raise InputError(f"{where}: token_id is {row!r}; {model!r} has rows 0 to {size - 1}")
    return model, row


def _check_bias(source: Source, vocabulary: Vocabulary) -> None:
    """Raise `InputError` for a model with a column per token, where the merge moves its tokens."""
    rows, name = vocabulary.row_of.get(source.reference), "final_logits_bias"
    moved = rows is not None and not np.array_equal(rows, np.arange(vocabulary.rows))
    if moved and any(other.endswith(name) for other in source.tensors):
        raise InputError(
            f"{source.reference}: {name} has a column for each token, and tokenizer_source moves tokens; merge models of one "
            "vocabulary, without tokenizer_source"
        )


def align(vocabulary: Vocabulary, sources: Sequence[Source]) -> list[Source]:
    """Return the models with the rows of their vocabulary tensors in the order of the merged vocabulary.

    Args:
      vocabulary: from `build`.
      sources: as for `build`.

    Raises:
      InputError: a tensor's rows differ in shape between two models, or a donor of the recipe lacks the tensor.
    """
    owners: dict[str, dict[str, Lazy]] = {}
    for source in sources:
        _check_bias(source, vocabulary)
        for name, tensor in source.tensors.items():
            if is_vocabulary(name, tensor, vocab_size(source.config)):
                owners.setdefault(name, {})[source.reference] = tensor
    # A tied model that stores no output matrix gives its embedding's rows.
    for name, models in owners.items():
        width = next(iter(models.values())).shape[1:]
        for source in sources:
            if source.reference not in models and is_tied(source.config) and not is_embedding(name):
                size = vocab_size(source.config)
                tied = (each for other, each in source.tensors.items() if is_matrix_of_tokens(other, each, size, True))
                if embedding := next((each for each in tied if each.shape[1:] == width), None):
                    models[source.reference] = embedding
    changed = {name: _aligned(name, vocabulary, models) for name, models in owners.items()}
    aligned = []
    for source in sources:
        replaced = {name: new[source.reference] for name, new in changed.items() if name in source.tensors}
        aligned.append(source._replace(tensors={**source.tensors, **replaced}))
    return aligned


def _aligned(name: str, vocabulary: Vocabulary, models: Mapping[str, Lazy]) -> dict[str, Lazy]:
    first = next(iter(models))
    for reference, tensor in models.items():
        if tensor.shape[1:] != models[first].shape[1:]:
            raise InputError(
                f"{name!r} is {models[first].shape} in {first!r} and {tensor.shape} in {reference!r}: only the number of rows "
                "may differ"
            )
    old = {reference: vocabulary.row_of[reference].copy() for reference in models}
    forced = sorted(vocabulary.forced)
    lacking = np.any([rows < 0 for rows in old.values()], axis=0)
    lacking[forced] = True
    fills: dict[int, list[tuple[Lazy, int]]] = {}
    for row in np.flatnonzero(lacking).tolist():
        if row in vocabulary.donors:
            donor = vocabulary.donors[row]
            if donor is not None and donor[0] not in models:
                raise InputError(
                    f"the recipe takes a token's row of {name!r} from {donor[0]!r}, which has no such tensor"
                )
            fills[row] = [] if donor is None else [(models[donor[0]], donor[1])]
            continue
        owning = [reference for reference in models if old[reference][row] >= 0]
        chosen = [reference for reference in owning if reference == vocabulary.base] or owning
        fills[row] = [(models[reference], int(old[reference][row])) for reference in chosen]
    padding = np.full(vocabulary.rows - vocabulary.token_rows, -1, np.int64)
    for rows in old.values():
        rows[forced] = -1
    return {
        reference: lazy.aligned(tensor, np.concatenate([old[reference], padding]), fills, vocabulary.token_rows)
        for reference, tensor in models.items()
    }
