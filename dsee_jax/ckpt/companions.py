"""The files beside the weights that belong to a model: tokenizer, processors, modules of sentence encoders, code of its own.

They are copied byte by byte. Code is copied and never run. A link that leaves the folder of the model is not followed: its
target is a file of this machine, not of the model.
"""

import fnmatch
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dsee_jax.ckpt.folders import GENERATION, MODEL_CONFIG, TOKENIZER_FILES

log = logging.getLogger(__name__)

PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "feature_extractor_config.json", "audio_tokenizer_config.json"),
)

MODULES = "modules.json"
"""The modules of a sentence encoder and their folders, such as ``1_Pooling``."""

_SENTENCE_FILES = (
    *(MODULES, "config_sentence_transformers.json", "sentence_bert_config.json", "sentence_xlnet_config.json"),
    *("sentence_roberta_config.json", "sentence_distilbert_config.json", "sentence_albert_config.json"),
    *("sentence_camembert_config.json", "sentence_xlm-roberta_config.json"),
)
_TEMPLATES = ("additional_chat_templates/*.jinja", "chat_templates/*.jinja", "*.tiktoken")
PATTERNS = (*PROCESSOR_FILES, *_SENTENCE_FILES, *_TEMPLATES)
"""Patterns of the files that any model may have; modules and code of its own have other names."""

_WITH_CODE = (MODEL_CONFIG, "tokenizer_config.json", *PROCESSOR_FILES)
_MODULE_FILES = (".json", ".txt", ".safetensors", ".model")


def tokenizer_files(folder: Path) -> list[str]:
    """Return the files of the tokenizer in a folder, by their paths there."""
    globbed = [path.relative_to(folder).as_posix() for pattern in _TEMPLATES for path in sorted(folder.glob(pattern))]
    return [name for name in (*TOKENIZER_FILES, *globbed) if _own(folder, name)]


def of_tokenizer(name: str) -> bool:
    """Return whether a file, by its path in a model's folder, belongs to the tokenizer."""
    return name in TOKENIZER_FILES or any(fnmatch.fnmatch(name, pattern) for pattern in _TEMPLATES)


def others(folder: Path) -> list[str]:
    """Return the other files of a model that are copied, by their paths in its folder."""
    names = (GENERATION, *PROCESSOR_FILES, *_SENTENCE_FILES, *_modules(folder), *_code(folder))
    return [name for name in dict.fromkeys(names) if _own(folder, name)]


def copy(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy files, by their paths in ``source``, into an existing folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _own(folder: Path, name: str) -> bool:
    """Return whether a file of a model exists and is its own: in its folder, or in the cache of the hub that holds both."""
    path = folder / name
    if not path.is_file():
        return False
    target, inside = path.resolve(), folder.resolve()
    # The hub's cache is NAME/snapshots/REVISION, whose files are links to NAME/blobs.
    cache = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    own = target.is_relative_to(inside) or target.is_relative_to(cache)
    if not own:
        log.warning("%s is a link to %s, outside of the model's folder, and is not copied", path, target)
    return own


def _modules(folder: Path) -> Iterator[str]:
    """Yield the files in the folders of a sentence encoder's modules."""
    listed = _read(folder / MODULES)
    for module in listed if isinstance(listed, list) else ():
        place = module.get("path") if isinstance(module, dict) else None
        # The first module is the model itself, in the folder.
        if not isinstance(place, str) or not place or not _below(place):
            continue
        if not (folder / place).is_dir():
            log.warning("%s names the module %s, which the folder lacks", folder / MODULES, place)
        for path in sorted((folder / place).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix in _MODULE_FILES:
                yield name
            elif path.is_file():
                log.warning("%s is not copied: a module of a sentence encoder has %s", path, ", ".join(_MODULE_FILES))


def _code(folder: Path) -> Iterator[str]:
    """Yield the code of a model: its configs name classes of ``.py`` files, which may import the others beside them."""
    configs = [_read(folder / name) for name in _WITH_CODE]
    if any(_local_code(config.get("auto_map")) for config in configs if isinstance(config, dict)):
        yield from (path.name for path in sorted(folder.glob("*.py")))


def _read(path: Path) -> Any:
    """Return the content of a JSON file, or None without one; a damaged file is copied, and says nothing of others."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is not JSON (%s): the files that it names are not copied", path, error)
        return None


def _local_code(value: Any) -> bool:
    """Return whether an ``auto_map`` names a class in the folder, ``file.Class``, not in another, ``org/name--file.Class``."""
    if isinstance(value, dict):
        return any(map(_local_code, value.values()))
    if isinstance(value, list):
        return any(map(_local_code, value))
    return isinstance(value, str) and "--" not in value


def _below(place: str) -> bool:
    """Return whether a path leads into a subfolder; ``.`` is the model itself, whose weights are not copied."""
    parts = PurePosixPath(place).parts
    return bool(parts) and not PurePosixPath(place).is_absolute() and ".." not in parts
