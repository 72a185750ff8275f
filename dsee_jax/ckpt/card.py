"""Model cards: the README.md beside a model, Markdown with YAML front matter, in which every name is text."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsee_jax.runtime import console


def render(name: str, data: Any, *parts: str) -> str:
    """Return a model card.

    Args:
      name: of the model; the heading.
      data: `huggingface_hub.ModelCardData`, the front matter.
      parts: Markdown, each after a line break.
    """
    from huggingface_hub import ModelCard

    return str(ModelCard("\n".join([f"---\n{data.to_yaml()}\n---", f"# {prose(name)}\n", *parts, ""])))


def hub_ids(references: Iterable[str]) -> list[str] | None:
    """Return the references that are ids of the hub, without their revisions, or None: the hub refuses a card whose
    ``base_model`` is anything else, such as a local folder.
    """
    parts = [part.partition("@")[0] for reference in references for part in reference.split("+")]
    ids = [part for part in parts if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", part) and not Path(part).exists()]
    return list(dict.fromkeys(ids)) or None


def link_papers(text: str) -> str:
    """Return a text in which an ``arXiv`` number is a link."""
    return re.sub(r"arXiv:? ?(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def block(text: str, language: str) -> str:
    """Return a text as a block of code, in which nothing is markup."""
    shown = "\n".join("\t".join(map(console.plain, line.split("\t"))) for line in text.rstrip().splitlines())
    fence = "`" * max(3, 1 + _backticks(shown))
    return f"{fence}{language}\n{shown}\n{fence}\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown; the cells are Markdown, as from `code` with ``in_table``."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(value: Any, *, in_table: bool = False) -> str:
    """Return a name or value as one Markdown code span, in which nothing is markup."""
    text = console.plain(str(value))
    if in_table:
        text = text.replace("|", "\\|")
    fence = "`" * (1 + _backticks(text))
    space = " " * (text.startswith("`") or text.endswith("`") or not text.strip())
    return f"{fence}{space}{text}{space}{fence}"


def prose(text: str) -> str:
    """Return a name as Markdown text without markup."""
    return re.sub(r"([\\`*\[\]<>#|~&$]|\b_|_\b)", r"\\\1", console.plain(text))


def _backticks(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
