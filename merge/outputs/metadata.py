"""The files beside the weights of a merged model: configuration, tokenizer, card, recipe."""

import filecmp
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsee_jax.ckpt import companions, tensors
from dsee_jax.ckpt.folders import CARD, GENERATION, KEPT, MODEL_CONFIG, read_json
from dsee_jax.errors import InputError
from merge.inputs import roles
from merge.inputs.sources import Source
from merge.recipes.chat_templates import AUTO

RECIPE = "merge_recipe.yml"

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_AT_ONCE = 1 << 20


def hashes(files: Iterable[Path], progress: Callable[[int], None] = lambda nbytes: None) -> dict[Path, str]:
    """Return the SHA-256 (hex) of every file; several threads hash and call ``progress`` with the number of bytes read.

    Files are memory-mapped, which the merge does too: nothing is copied, and no page is mapped twice.

    Raises:
      InputError: a file cannot be read.
    """

    def digest(file: Path) -> str:
        sha256 = hashlib.sha256()
        try:
            contents = tensors.every_byte(file)
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror})") from None
        for start in range(0, contents.size, _AT_ONCE):
            if file.stat().st_size != contents.size:  # reading beyond the end of a mapped file kills the process
                raise InputError(f"{file} has changed while it was read; start again when nothing writes it")
            part = contents[start : start + _AT_ONCE]
            sha256.update(part.data)
            progress(part.size)
        return sha256.hexdigest()

    unique = list(dict.fromkeys(files))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(unique, pool.map(digest, unique), strict=True))


def config(
    fields: Mapping[str, Any],
    *,
    dtype: str | None = None,
    layers: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Return the merged model's config.json.

    Args:
      fields: config.json of the base, or of the first model.
      dtype: the written type, by its name in safetensors; None: unchanged.
      layers: for each written layer, the layer of ``fields`` that gives its entry in lists with one entry per layer (such as
        ``layer_types``); None: unchanged.
      vocab_size: number of rows of the written embedding; None: unchanged.

    Raises:
      InputError: the number of layers or rows changes, and no field holds that number.
    """
    result = dict(fields)
    if dtype is not None:
        # The key is dtype in newer files and torch_dtype in older files; transformers reads both.
        for key in [key for key in ("dtype", "torch_dtype") if key in result] or ["dtype"]:
            result[key] = _DTYPES[dtype]
    if layers is not None:
        _change(result, _LAYERS, len(layers), "layers", layers)
    if vocab_size is not None:
        if roles.vocab_size(result) is None:
            raise InputError("config.json of the base says nothing of its rows of the embedding: expected vocab_size")
        result = roles.changed(result, "vocab_size", vocab_size)
    return result


def _change(
    fields: dict[str, Any], keys: Sequence[str], value: int, subject: str, layers: Sequence[int] | None = None
) -> None:
    """Set the first of ``keys`` that is in ``fields`` or, for multimodal models, in its ``text_config``."""
    inner = fields.get("text_config")
    for place in (fields, inner if isinstance(inner, dict) else {}):
        for key in keys:
            if key in place:
                old, changed = place[key], {key: value}
                if layers is not None:
                    changed |= {
                        name: [entries[layer] for layer in layers]
                        for name, entries in place.items()
                        if "layer" in name and isinstance(entries, list) and len(entries) == old
                    }
                if place is fields:
                    fields |= changed
                else:
                    fields["text_config"] = place | changed
                return
    raise InputError(f"config.json of the base says nothing of its {subject}: expected one of {', '.join(keys)}")


def chat_template(choice: str, folders: Sequence[Path]) -> str | None:
    """Return the text for a recipe's ``chat_template``, or None if no model has a template.

    Args:
      choice: ``auto``, the most frequent template of the models; or the text of a template.
      folders: of the models.
    """
    if choice == AUTO:
        templates = [template.strip() for folder in folders if (template := _template(folder))]
        return Counter(templates).most_common(1)[0][0] if templates else None
    return choice


def _template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def copied(sources: Sequence[Source]) -> tuple[dict[str, Path], list[str]]:
    """Return ``{path in the output: file}`` of the files that the result takes from its models, and warnings.

    They are the first model's: tokenizer (its adapter's, if that has one), generation config, processors, code, list of heads
    and neurons. The modules of a sentence encoder are those of the first model that has them.

    Args:
      sources: the opened models, the one that gives the result's config first.
    """
    first, *others = sources
    files = {name: first.tokenizer / name for name in companions.tokenizer_files(first.tokenizer)}
    files |= {name: first.folder / name for name in companions.others(first.folder)}
    if (first.folder / KEPT).is_file():
        files[KEPT] = first.folder / KEPT
    warnings = []
    for source in others:
        theirs = {name: source.folder / name for name in companions.others(source.folder) if name != GENERATION}
        if companions.MODULES in theirs and companions.MODULES not in files:
            files = theirs | files
            warnings.append(f"{first.reference} is no sentence encoder: the modules of {source.reference} are copied")
        differing = [name for name, file in theirs.items() if name in files and not _equal(file, files[name])]
        if differing:
            listed = f"{', '.join(differing[:4])}{' ...' * (len(differing) > 4)}"
            owner = next(each for each in sources if files[differing[-1]].is_relative_to(each.folder))
            warnings.append(f"{source.reference} has other files {listed}; those of {owner.reference} are copied")
    return files, warnings


def _equal(a: Path, b: Path) -> bool:
    return a == b or (a.stat().st_size == b.stat().st_size and filecmp.cmp(a, b, shallow=False))


def write(
    folder: Path,
    files: Mapping[str, Path],
    fields: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    template: str | None = None,
    card: str,
    recipe: str,
) -> None:
    """Write every file beside the weights into an existing folder.

    Args:
      folder: the output folder.
      files: from `copied`.
      fields: from `config`.
      tokenizer: of transformers; replaces the tokenizer of ``files``.
      template: from `chat_template`; replaces the tokenizer's template.
      card: from `merge.outputs.card.card`.
      recipe: from `merge.outputs.card.recipe_text`.
    """
    _json(folder / MODEL_CONFIG, fields)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    for name, file in files.items():
        if tokenizer is None or not companions.of_tokenizer(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        if settings.exists():
            _json(settings, {key: value for key, value in read_json(settings).items() if key != "chat_template"})
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / RECIPE).write_text(recipe, encoding="utf-8")


def _json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
