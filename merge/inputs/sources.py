"""The models of a merge: their tensors, with an adapter folded in where the reference names an adapter.

A reference is ``path[@revision][+adapter[@revision]]``, as in mergekit. Opening a model reads headers and adapters only;
the merge reads tensors in chunks.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax.ckpt import adapter, formats, gguf, kept_units, spelling, tensors, tokenizer
from dsee_jax.ckpt.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, KEPT, MODEL_CONFIG, read_json
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.ckpt.tensors import DTYPES
from dsee_jax.errors import InputError
from dsee_jax.runtime import storage
from dsee_jax.runtime.storage import Place
from dsee_jax.typing import Masks
from merge.inputs import adapters, roles
from merge.inputs.lazy import Lazy, equal, plain

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """An opened model."""

    reference: str
    folder: Path  # of the model itself, not of its adapter
    config: dict[str, Any]
    tensors: Mapping[str, Lazy]
    files: Mapping[str, Path]  # every input file, by a name that starts with the reference's path
    kept: Masks  # masks of the remaining heads and neurons; empty for a model that is not structurally pruned
    adapter: Path | None = None  # the folder of its adapter
    own_tokenizer: bool = False  # whether the adapter's folder has a tokenizer that fits the model

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: the adapter's, if it has one that fits, else the model's."""
        return self.adapter if self.adapter and self.own_tokenizer else self.folder


def open_source(reference: str, beside: Place) -> Source:
    """Open a model, and its adapter if the reference names one, from the headers of their files.

    Args:
      reference: ``path[@revision][+adapter[@revision]]``. A path is a folder or GGUF file beside the recipe, in the
        working folder or in a store (a URL, in which ``@`` means nothing), ``package:NAME``, or a hub id; an adapter is this
        library's or a LoRA in PEFT's layout.
      beside: the folder of the recipe.

    Raises:
      InputError: a file is missing, damaged or of an unsupported kind; one line that names the file.
    """
    path, folder, extra = located(reference, beside)
    config = formats.model_config(folder)
    stored = tensors.index(folder)
    lazies = _unwrapped({name: plain(where) for name, where in stored.items()})
    kept = kept_units.read(folder)
    if not kept and any(key.startswith("kept_") for key in config):
        raise InputError(f"{folder / KEPT} is missing: it lists the heads and neurons of a structurally pruned model")
    beside_weights = [folder / MODEL_CONFIG, *([folder / KEPT] if kept else [])]
    files = _labels(path, [*beside_weights, *(where.file for where in stored.values())])
    if extra:
        name, place = extra
        if (where := kept_units.difference(kept_units.read(place), kept)) and (place / ADAPTER_WEIGHTS).exists():
            raise InputError(
                f"{place} and {folder} are pruned differently: {where} differ; put an adapter on the model/ of its run"
            )
        lazies, used, config = adapters.adapted(place, config, lazies)
        files |= _labels(name, used)
    for name, tensor in lazies.items():
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{tensor.files[0]}: {name!r} is stored as {tensor.dtype}; expected one of {', '.join(DTYPES)}: "
                "convert the model first"
            )
    config = _as_stored(reference, config, lazies)
    place = extra[1] if extra else None
    return Source(reference, folder, config, lazies, files, kept, place, place is not None and _fits(place, config))


def _unwrapped(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Return the tensors without wrappers in their names, unless two would have one name."""
    renamed = {spelling.unwrapped(name): tensor for name, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def _as_stored(reference: str, config: dict[str, Any], tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    """Return the config, untied if the files hold an output matrix that differs from the embedding, as in transformers 5.

    Reads the two matrices of a tied model that stores both, to their first difference.
    """
    if not roles.is_tied(config):
        return config
    size = roles.vocab_size(config)
    embedding, output = (
        next(
            (tensor for name, tensor in tensors.items() if roles.is_matrix_of_tokens(name, tensor, size, looked_up)),
            None,
        )
        for looked_up in (True, False)
    )
    if embedding is None or output is None or equal(embedding, output):
        return config
    if config.get("tie_word_embeddings"):
        log.warning("%s stores an output matrix that differs from the embedding: it is read as untied", reference)
    return roles.changed(config, "tie_word_embeddings", False)


def check_bases(sources: Iterable[Source]) -> dict[Path, str]:
    """Raise `InputError` for an adapter of this library on other weights than those it was trained on.

    Reads the weights of such bases. Returns the SHA-256 of the files that are known from it.
    """
    known = {}
    for source in sources:
        if source.adapter is None or not (source.adapter / ADAPTER_WEIGHTS).exists():
            continue
        config = read_json(source.adapter / ADAPTER_CONFIG)
        if not {adapter.BASE_SHA256, adapter.MODEL_SHA256} & config.keys():
            continue
        digest = adapter.fingerprint(source.folder)
        adapter.check_base(source.adapter, config, source.folder, digest, allow="--allow-changed-base")
        # The fingerprint of one file is its SHA-256.
        files = [*source.folder.glob("*.safetensors")]
        known |= {files[0]: digest} if len(files) == 1 else {}
    return known


def _fits(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether an adapter's folder has a tokenizer whose tokens have rows in the model; warn if they have not."""
    if not tokenizer.has_vocabulary(folder):
        return False
    size, file = roles.vocab_size(config), folder / "tokenizer.json"
    last = _last_token(read_json(file)) if file.is_file() and size else 0
    if size and last >= size:
        log.warning(
            "%s has a token in row %d, and the model with the adapter has %d rows: the model's tokenizer is taken instead",
            *(file, last, size),
        )
        return False
    return True


def _last_token(fields: Mapping[str, Any]) -> int:
    """Return the highest row of a token in the content of ``tokenizer.json``."""
    model, added = fields.get("model"), fields.get("added_tokens")
    tokens = model.get("vocab") if isinstance(model, dict) else None
    rows = [*tokens.values()] if isinstance(tokens, dict) else [len(tokens) - 1 if isinstance(tokens, list) else 0]
    rows += [entry.get("id") for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return max((row for row in rows if isinstance(row, int)), default=0)


def _labels(path: str, files: Iterable[Path]) -> dict[str, Path]:
    return {f"{path}/{file.name}": file for file in sorted(set(files))}


def located(reference: str, beside: Place) -> tuple[str, Path, tuple[str, Path] | None]:
    """Return a reference's path and folder, and its adapter's path and folder or None; raises `InputError`."""
    if _folder(reference, beside):
        return reference, _local(reference, None, beside), None
    parts = _parts(reference)
    if len(parts) > 2 or any(len(part) > 2 or not all(part) for part in parts):
        raise InputError(
            f"cannot read the model {reference!r}: expected 'path', 'path@revision' or 'path+adapter', each once"
        )
    places = [(part[0], _local(part[0], part[1] if len(part) == 2 else None, beside)) for part in parts]
    return *places[0], places[1] if len(places) == 2 else None


def _parts(reference: str) -> list[list[str]]:
    """Return ``[path]`` or ``[path, revision]`` of the model and of its adapter; a URL of a store has no revision."""
    return [[part] if storage.remote(part) else part.split("@") for part in reference.split("+")]


def moved(reference: str, beside: Place, written: Callable[[Place], str]) -> str:
    """Return a reference with ``written(folder)`` for each folder beside the recipe or in the working folder."""
    if folder := _folder(reference, beside):
        return written(folder)
    parts = _parts(reference)
    folders = [_folder(path, beside) for path, *_ in parts]
    return "+".join(
        "@".join([written(folder) if folder else path, *rest])
        for (path, *rest), folder in zip(parts, folders, strict=True)
    )


def _folder(text: str, beside: Place) -> Place | None:
    """Return the folder or GGUF file ``text``, beside the recipe or in the working folder; None: neither, or a store."""
    if storage.remote(text):
        return None
    try:
        local = Path(text).expanduser()
        return next((path for path in (beside / local, local) if text and _is_model(path)), None)
    except (OSError, RuntimeError, ValueError):  # too long for a name, an unknown ~user, a NUL
        return None


def _is_model(path: Place) -> bool:
    return path.is_dir() or (path.suffix == gguf.SUFFIX and path.is_file())


def _local(text: str, revision: str | None, beside: Place) -> Path:
    if folder := _folder(text, beside):
        if revision is not None:
            raise InputError(f"{text}@{revision}: {folder} is a folder, which has no revisions: leave out @{revision}")
        return resolve(str(folder))
    try:
        return resolve(text, revision)
    except InputError as error:
        raise InputError(f"{error}; looked beside the recipe too, in {beside}") from None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the model {text!r} cannot be opened ({reason}): give a folder or a hub id") from None
