"""What stands around the weights of a merged model: configuration, tokenizer, card, recipe."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsee_jax.ckpt import cuts, tensors
from dsee_jax.ckpt.folders import GENERATION, TOKENIZER_FILES, read_json
from dsee_jax.errors import InputError

RECIPE, CARD = "merge_recipe.yml", "README.md"

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_AT_ONCE = 1 << 20


def hashes(files: Iterable[Path], progress: Callable[[int], None] = lambda nbytes: None) -> dict[Path, str]:
    """Return the SHA-256 (hex) of every file, several at a time; ``progress`` is told the bytes read, from any thread.

    Files are memory-mapped, as a merge has them mapped already: nothing is copied, and no page mapped twice.

    Raises:
      InputError: a file cannot be read.
    """

    def digest(file: Path) -> str:
        found = hashlib.sha256()
        try:
            every = tensors.every_byte(file)
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror})") from None
        for start in range(0, every.size, _AT_ONCE):
            part = every[start : start + _AT_ONCE]
            found.update(part.data)
            progress(part.size)
        return found.hexdigest()

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
      fields: the base's, or the first model's.
      dtype: the written type, by its name in safetensors; None: as it was.
      layers: for each written layer, which layer of ``fields``' model stands for it in lists with one entry a layer (such as
        ``layer_types``); None: as it was.
      vocab_size: rows of the written embedding; None: as they were.

    Raises:
      InputError: a number of layers or rows must change, and no field says it.
    """
    made = dict(fields)
    if dtype is not None:
        # Newer files say dtype and older ones torch_dtype; transformers reads either.
        for key in [key for key in ("dtype", "torch_dtype") if key in made] or ["dtype"]:
            made[key] = _DTYPES[dtype]
    if layers is not None:
        _change(made, _LAYERS, len(layers), "layers", layers)
    if vocab_size is not None:
        _change(made, ("vocab_size",), vocab_size, "rows of the embedding")
    return made


def _change(
    made: dict[str, Any], keys: Sequence[str], value: int, what: str, layers: Sequence[int] | None = None
) -> None:
    """Set the first of ``keys`` that is in ``made`` or, for models of text and more, in its ``text_config``."""
    inner = made.get("text_config")
    for place in (made, inner if isinstance(inner, dict) else {}):
        for key in keys:
            if key in place:
                old, changed = place[key], {key: value}
                if layers is not None:
                    lists = {
                        name: found for name, found in place.items() if isinstance(found, list) and len(found) == old
                    }
                    whole = {name: found for name, found in lists.items() if "layer" in name}
                    changed |= {name: [found[layer] for layer in layers] for name, found in whole.items()}
                if place is made:
                    made |= changed
                else:
                    made["text_config"] = place | changed
                return
    raise InputError(f"config.json of the base says nothing of its {what}: expected one of {', '.join(keys)}")


def chat_template(choice: str, folders: Sequence[Path]) -> str | None:
    """Return the chat template of a recipe's ``chat_template``, or None when the models have none.

    Args:
      choice: ``auto``, the template that most models have; or the text of a Jinja template.
      folders: of the models.

    Raises:
      InputError: neither; templates are not known by name.
    """
    if choice == "auto":
        found = [template.strip() for folder in folders if (template := _template(folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if "{" not in choice:
        raise InputError(
            f"chat_template is {choice!r}; expected auto or the text of a Jinja template: templates are not known by name"
        )
    return choice


def _template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


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
    """Write everything but the weights into an existing folder.

    Args:
      folder: where.
      donor: the folder of the base, or of the first model: generation_config.json, the tokenizer and, of a model that was cut,
        the units it is made of come from it.
      fields: from `config`.
      tokenizer: of transformers, to be written in place of the donor's.
      template: from `chat_template`, in place of the tokenizer's own.
      card: from `merge.outputs.card.card`.
      recipe: from `merge.outputs.card.recipe_text`.
    """
    _json(folder / "config.json", fields)
    copied = [GENERATION, cuts.KEPT]
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
