"""The files beside the weights of a merged model: configuration, tokenizer, card, recipe."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsee_jax.ckpt import tensors
from dsee_jax.ckpt.folders import GENERATION, KEPT, MODEL_CONFIG, TOKENIZER_FILES, read_json
from dsee_jax.errors import InputError

RECIPE, CARD = "merge_recipe.yml", "README.md"

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
        _change(result, ("vocab_size",), vocab_size, "rows of the embedding")
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
      choice: ``auto``, the most frequent template of the models; or the text of a Jinja template.
      folders: of the models.

    Raises:
      InputError: ``choice`` is neither; names of templates are not supported.
    """
    if choice == "auto":
        templates = [template.strip() for folder in folders if (template := _template(folder))]
        return Counter(templates).most_common(1)[0][0] if templates else None
    if "{" not in choice:
        raise InputError(
            f"chat_template is {choice!r}; expected auto or the text of a Jinja template: names of templates are not supported"
        )
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


def write(
    folder: Path,
    donor: Path,
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
      donor: the folder of the base or of the first model. Its generation_config.json, tokenizer and, for a structurally
        pruned model, list of heads and neurons are copied.
      fields: from `config`.
      tokenizer: of transformers; replaces the donor's.
      template: from `chat_template`; replaces the tokenizer's template.
      card: from `merge.outputs.card.card`.
      recipe: from `merge.outputs.card.recipe_text`.
    """
    _json(folder / MODEL_CONFIG, fields)
    copied = [GENERATION, KEPT]
    if tokenizer is None:
        copied += TOKENIZER_FILES
    else:
        tokenizer.save_pretrained(str(folder))
    for name in copied:
        if (donor / name).is_file():
            shutil.copyfile(donor / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        if settings.exists():
            _json(settings, {key: value for key, value in read_json(settings).items() if key != "chat_template"})
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / RECIPE).write_text(recipe, encoding="utf-8")


def _json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
