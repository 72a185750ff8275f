"""What a merge reads: the tensors of a model, with an adapter folded in where the reference names one.

A reference is ``path[@revision][+adapter[@revision]]``, as in mergekit. Nothing but headers and adapters is read before a
merge asks for a stretch of a tensor.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax import stores
from dsee_jax.aliases import Masks
from dsee_jax.ckpt import adapter, cuts, tensors
from dsee_jax.ckpt.folders import read_json
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.ckpt.tensors import DTYPES
from dsee_jax.errors import InputError
from dsee_jax.stores import Place
from merge.inputs import adapters
from merge.inputs.lazies import Lazy, plain


class Source(NamedTuple):
    """An opened model."""

    reference: str
    folder: Path  # of the model itself, not of its adapter
    config: dict[str, Any]
    tensors: Mapping[str, Lazy]
    files: Mapping[str, Path]  # all that is read, by a name that starts with the reference's path
    kept: Masks  # the heads and neurons that are left; empty where none were cut out


def open_source(reference: str, beside: Place) -> Source:
    """Open a model, and the adapter that its reference may name, from the headers of their files.

    Args:
      reference: ``path[@revision][+adapter[@revision]]``. A path is a folder beside the recipe, a folder in the working
        folder or in a store, ``package:NAME``, or a hub id; an adapter is ours or a LoRA in PEFT's layout.
      beside: the folder of the recipe.

    Raises:
      InputError: anything missing, damaged or of a kind that is not read; one line that names it.
    """
    path, folder, extra = located(reference, beside)
    config = read_json(folder / "config.json")
    stored = tensors.index(folder)
    found: dict[str, Lazy] = {name: plain(where) for name, where in stored.items()}
    kept = cuts.read(folder)
    if not kept and any(key.startswith("kept_") for key in config):
        raise InputError(f"{folder / cuts.KEPT} is missing: it says which heads and neurons a cut model is made of")
    beside_weights = [folder / "config.json", *([folder / cuts.KEPT] if kept else [])]
    files = _labels(path, [*beside_weights, *(where.file for where in stored.values())])
    if extra:
        name, place = extra
        if (where := cuts.difference(cuts.read(place), kept)) and (place / adapter.WEIGHTS).exists():
            raise InputError(
                f"{place} and {folder} are of two cuts: {where} differ; put an adapter on the model/ of its run"
            )
        found, used = adapters.adapted(place, config, found)
        files |= _labels(name, used)
    for name, lazy in found.items():
        if lazy.dtype not in DTYPES:
            raise InputError(
                f"{lazy.files[0]}: {name!r} is stored as {lazy.dtype}; expected one of {', '.join(DTYPES)}: "
                "convert the model first"
            )
    return Source(reference, folder, config, found, files, kept)


def _labels(path: str, files: Iterable[Path]) -> dict[str, Path]:
    return {f"{path}/{file.name}": file for file in sorted(set(files))}


def located(reference: str, beside: Place) -> tuple[str, Path, tuple[str, Path] | None]:
    """Return the path of a reference, its folder, and the same of its adapter or None; raises `InputError`."""
    if _folder(reference, beside):
        return reference, _local(reference, None, beside), None
    parts = [part.split("@") for part in reference.split("+")]
    if len(parts) > 2 or any(len(part) > 2 or not all(part) for part in parts):
        raise InputError(
            f"cannot read the model {reference!r}: expected 'path', 'path@revision' or 'path+adapter', each once"
        )
    found = [(part[0], _local(part[0], part[1] if len(part) == 2 else None, beside)) for part in parts]
    return *found[0], found[1] if len(found) == 2 else None


def _folder(text: str, beside: Place) -> Place | None:
    """Return the folder that ``text`` is, beside the recipe or here; None for one of a store, which is no other thing."""
    if stores.remote(text):
        return None
    try:
        local = Path(text).expanduser()
        return next((path for path in (beside / local, local) if text and path.is_dir()), None)
    except (OSError, RuntimeError, ValueError):  # too long for a name, an unknown ~user, a NUL
        return None


def _local(text: str, revision: str | None, beside: Place) -> Path:
    if folder := _folder(text, beside):
        if revision is not None:
            raise InputError(f"{text}@{revision}: {folder} is a folder, which has no revisions: leave out @{revision}")
        return resolve(str(folder)) if stores.remote(folder) else Path(folder)
    try:
        return resolve(text, revision)
    except InputError as error:
        raise InputError(f"{error}; looked beside the recipe too, in {beside}") from None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the model {text!r} cannot be opened ({reason}): give a folder or a hub id") from None
