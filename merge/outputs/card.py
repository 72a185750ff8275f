"""The provenance of a merged model: its model card, and its recipe with the SHA-256 of every input."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsee_jax.runtime import console, strict_yaml

HEADER = "# SHA-256 of every file that was read:"
"""The first line of the recipe that a merge writes beside its model."""


def recipe_text(recipe: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Return the resolved recipe as YAML that runs again, after a comment with the inputs' SHA-256.

    Args:
      recipe: plain dicts, lists and scalars, all defaults filled in.
      digests: ``{name of an input: SHA-256, hex}``.
    """
    lines = [f"# {digest}  {console.plain(name)}" for name, digest in sorted(digests.items())]
    return "\n".join([HEADER, *lines, "", strict_yaml.dump(dict(recipe))])


def card(
    name: str,
    *,
    method: str,
    about: str,
    models: Sequence[str],
    base: str | None,
    recipe: str,
    options: Mapping[str, Any],
    digests: Mapping[str, str],
) -> str:
    """Return the model card, Markdown with YAML front matter.

    Args:
      name: of the merged model.
      method: its key in the table of methods.
      about: the method's help, in one line; an ``arXiv`` number in it becomes a link.
      models: the references of the merged models, without the base.
      base: the reference of the base, or None.
      recipe: the recipe as the user wrote it.
      options: of the method, as resolved.
      digests: ``{name of an input: SHA-256, hex}``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    # The hub refuses a card whose base_model is not a hub id, such as a local folder.
    parts = [part.partition("@")[0] for model in ([base] if base else []) + list(models) for part in model.split("+")]
    ids = list(
        dict.fromkeys(part for part in parts if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", part) and not Path(part).exists())
    )
    data = ModelCardData(base_model=ids or None, library_name="transformers", tags=["merge", method])
    linked = re.sub(r"arXiv:? ?(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", about)
    shown = "\n".join("\t".join(map(console.plain, line.split("\t"))) for line in recipe.rstrip().splitlines())
    fence = "`" * max(3, 1 + _backticks(shown))
    content = "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {_prose(name)}\n",
            f"Merged with **{method}**: {linked}.\n",
            "## Models\n",
            *([f"- {_code(base)} (the base)"] if base else []),
            *(f"- {_code(model)}" for model in models),
            "\n## Options\n",
            *([f"- {_code(key)}: {_code(value)}" for key, value in options.items()] or ["None."]),
            f"\n## Recipe\n\n{fence}yaml\n{shown}\n{fence}\n",
            "## Inputs\n",
            "| file | SHA-256 |\n|---|---|",
            *(f"| {_code(file, in_table=True)} | {_code(digest)} |" for file, digest in sorted(digests.items())),
            "",
        ]
    )
    return str(ModelCard(content))


def _backticks(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _code(value: Any, *, in_table: bool = False) -> str:
    """Return a name or value as one Markdown code span, in which nothing is markup."""
    text = console.plain(str(value))
    if in_table:
        text = text.replace("|", "\\|")
    fence = "`" * (1 + _backticks(text))
    space = " " * (text.startswith("`") or text.endswith("`") or not text.strip())
    return f"{fence}{space}{text}{space}{fence}"


def _prose(text: str) -> str:
    """Return a name as Markdown text without markup."""
    return re.sub(r"([\\`*\[\]<>#|~&$]|\b_|_\b)", r"\\\1", console.plain(text))
