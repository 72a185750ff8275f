"""The fenced blocks of Markdown pages, the commands in them, and the files that their code names."""

import functools
import pathlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import decoders
import gguf_files
import loras
import tiny
import train
from dsee_jax import __main__ as verbs
from dsee_jax.runtime import command
from dsee_jax.train import config_file
from merge import __main__ as merges

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md") for path in ROOT.glob(pattern) if "_build" not in path.parts
)

_FENCE = re.compile(
    r"^(?:<!-- needs (?P<needs>[\w ]+) -->\n)?"
    r"(?P<indent> *)```(?P<language>[\w{}-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str
    line: int
    """Of the first line of the text, from 1."""
    needs: tuple[str, ...] = ()
    """Packages that the code needs and this project does not: the names in ``<!-- needs NAME -->`` above the fence."""


def blocks(page: pathlib.Path, *languages: str) -> list[Block]:
    """Return the blocks of a page in these languages; without languages, all but the directives of MyST."""
    content = page.read_text()
    every = (
        Block(
            match["language"],
            match["text"],
            content[: match.start("text")].count("\n") + 1,
            tuple((match["needs"] or "").split()),
        )
        for match in _FENCE.finditer(content)
    )
    return [
        block for block in every if (block.language in languages if languages else not block.language.startswith("{"))
    ]


def world(folder: pathlib.Path) -> pathlib.Path:
    """Write the folders that the pages' code names, and return their folder."""
    tiny.bert(folder / "HF_DIR")
    for seed, name in enumerate(("BASE", "TUNED_A", "TUNED_B")):
        tiny.bert(folder / name, seed=seed)
    for name in ("LLAMA_DIR", "OUT"):
        decoders.write(folder / name)
    loras.write(folder / "LORA", loras.pairs({"model.layers.0.self_attn.q_proj": (24, 24)}))
    layers = [f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")]
    updates = loras.pairs(dict.fromkeys(layers, (24, 24)))
    head = {"classifier.weight": np.zeros((2, 24), np.float32), "classifier.bias": np.zeros(2, np.float32)}
    loras.write(folder / "my_adapter", updates | head, base_model_name_or_path="HF_DIR", task_type="SEQ_CLS")
    gguf_files.write(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return folder


def script(block: Block) -> str:
    """Return the commands of a shell block: of a console, those after ``$``."""
    if block.language != "console":
        return block.text
    return "".join(line[2:] for line in block.text.splitlines(keepends=True) if line.startswith("$ "))


def commands(script: str) -> Iterator[list[str]]:
    """Yield the words of every simple command of a shell script, without assignments and comments."""
    # A variable of a loop is a number.
    for line in re.sub(r"\$\w\b", "1", script.replace("\\\n", " ")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)


def check(words: list[str]) -> bool:
    """Parse a command of this project by its own parser and return True; False for a command of others.

    Raises:
      SystemExit, InputError, AssertionError: an unknown option, key, file or extra.
    """
    text = " ".join(words)
    if match := re.search(r"pip install .*\.\[([\w,]+)\]", text):
        assert set(match[1].split(",")) <= _extras(), f"no such extra: {text}"
    starts = [number for number, word in enumerate(words) if re.fullmatch(r"(.*/)?python3?", word)]
    if not starts:
        return False
    program, *arguments = words[starts[0] + 1 :]
    if program == "train.py":
        given, overrides = command.split(arguments)
        config = train.parser().parse_args(given).config
        _exists(config)
        config_file.read(ROOT / config if (ROOT / config).is_file() else None, overrides)
        return True
    if program != "-m":
        return False
    module, *arguments = arguments
    if module == "dsee_jax":
        given, overrides = command.split(arguments)
        options = verbs.parser().parse_args(given)
        assert not overrides or options.verb in verbs.OVERRIDES, text
        config_file.read(None, overrides)
    elif module == "merge":
        _merge(arguments)
    elif module.startswith("benchmarks."):
        path = module.replace(".", "/")
        _exists(f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py")
    return True


def _merge(arguments: list[str]) -> None:
    if arguments == ["--methods"]:
        return
    if arguments[:1] == ["compare"]:
        merges.compare_parser().parse_args(arguments[1:])
    else:
        merges.parser().parse_args(arguments)


def _exists(path: str | pathlib.Path) -> None:
    """A path in a folder of the repository exists; others stand for the reader's own files."""
    if "/" in str(path):
        assert (ROOT / path).exists(), f"no such file: {path}"


@functools.cache
def _extras() -> frozenset[str]:
    return frozenset(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
