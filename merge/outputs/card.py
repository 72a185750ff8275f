"""The provenance of a merged model: its model card, and its recipe with the SHA-256 of every input."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsee_jax.ckpt.card import block, code, hub_ids, link_papers, render, table
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
    from huggingface_hub import ModelCardData

    ids = hub_ids([base, *models] if base else models)
    data = ModelCardData(base_model=ids, library_name="transformers", tags=["merge", method])
    return render(
        name,
        data,
        f"Merged with **{method}**: {link_papers(about)}.\n",
        "## Models\n",
        *([f"- {code(base)} (the base)"] if base else []),
        *(f"- {code(model)}" for model in models),
        "\n## Options\n",
        *([f"- {code(key)}: {code(value)}" for key, value in options.items()] or ["None."]),
        f"\n## Recipe\n\n{block(recipe, 'yaml')}",
        "## Inputs\n",
        table(
            ["file", "SHA-256"],
            [[code(file, in_table=True), code(digest)] for file, digest in sorted(digests.items())],
        ),
    )
