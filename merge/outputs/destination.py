"""The output folder of a merge: checked before any work, and replaced only where a merge wrote everything in it."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from dsee_jax.ckpt import companions
from dsee_jax.ckpt.folders import MODEL_FILES
from dsee_jax.errors import InputError
from dsee_jax.runtime import atomic, earlier_output, storage, writable
from dsee_jax.runtime.storage import Place
from dsee_jax.runtime.store_path import StorePath
from merge.outputs.card import HEADER
from merge.outputs.heatmap import PICTURE
from merge.outputs.metadata import RECIPE
from merge.streaming import staging

FILES = (*MODEL_FILES, *companions.PATTERNS, RECIPE, PICTURE)
"""Patterns of the names in the output of every merge; copied files of a model add to them."""


def located(text: str) -> Place:
    """Return the place that the argument OUT_DIR names; the end of a symbolic link, where it is one.

    Raises:
      InputError: the text is empty, or names a whole bucket, a loop of links or the store of an unsupported kind.
    """
    if not text.strip():
        raise InputError("OUT_DIR is empty; name a folder")
    place = storage.as_output(text)
    if not isinstance(place, Path):
        if "/" not in place.inside:
            raise InputError(f"OUT_DIR {text} is a whole bucket; name a folder in it")
        return place
    try:
        end = Path(os.path.realpath(place))
    except ValueError as error:
        raise InputError(f"OUT_DIR {text!r}: {error}; give a plainer path") from None
    if os.path.islink(end):
        raise InputError(f"OUT_DIR {text} is a loop of symbolic links; name another folder")
    return end


def check(
    out: Place,
    inputs: Iterable[str | os.PathLike[str]],
    *,
    copied: Collection[str] = (),
    overwrite: bool,
    resumes: bool = False,
) -> None:
    """Raise `InputError` unless a merge may write ``out``.

    Args:
      out: from `located`.
      inputs: every file that the merge reads.
      copied: the files of the models that the merge copies, by their paths in ``out``.
      overwrite: replace the output of an earlier merge.
      resumes: ``out`` may hold a part of this merge's own output, of an upload that failed.

    Raises:
      InputError: ``out`` is not empty (without ``overwrite``), holds a file that no merge wrote, an input, the working folder
        or the home folder, or cannot be written.
    """
    if isinstance(out, Path):
        _check_local(out, copied)
    for file in inputs:
        if inside := _inside(out, file):
            raise InputError(f"{out} holds the input {inside}; give another OUT_DIR")
    with storage.store_errors(out):
        if not (overwrite or resumes) and out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} exists; give another OUT_DIR, or --overwrite to replace it")
        marker = None if resumes else (RECIPE, HEADER)
        earlier_output.check(out, (*FILES, *copied), marker=marker)


def _inside(out: Place, file: str | os.PathLike[str]) -> str | None:
    """Return the path of an input if it is in the folder ``out``."""
    if isinstance(out, Path):
        ends = () if storage.remote(file) else (Path(file).absolute(), Path(os.path.realpath(file)))
        return next((str(path) for path in ends if out in path.parents), None)
    url = os.fspath(file) if storage.remote(file) else storage.origin(Path(file))
    if url is None:
        return None
    place = StorePath(url)
    return url if place.scheme == out.scheme and place.inside.startswith(f"{out.inside}/") else None


def _check_local(out: Path, copied: Collection[str]) -> None:
    home = Path(os.path.realpath(os.path.expanduser("~")))
    for name, folder in (("the working folder", Path.cwd()), ("your home folder", home)):
        if out == folder or out in folder.parents:
            raise InputError(f"OUT_DIR {out} is or holds {name}; name a new folder")
    writable.check(out, "OUT_DIR")
    if os.path.ismount(out):
        raise InputError(f"OUT_DIR {out} is a mount point, which cannot be replaced; name a folder in it")
    for suffix, names in (("partial", (*FILES, *staging.FILES)), ("old", FILES)):
        path = atomic.hidden(out, suffix)
        if path.is_symlink() or path.is_file():
            raise InputError(f"{path} is no folder of a merge, but in the way of its unfinished output; remove it")
        if not (path / staging.STAMP).is_file():  # of a merge, perhaps of other models
            earlier_output.check(path, (*names, *copied))
