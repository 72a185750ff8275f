"""The data of `benchmarks.decoders`: E2E with fewer scored prompts, SST-2 as prompts, and the held text of forgetting."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from dsee_jax.errors import InputError
from dsee_jax.runtime import files

WORDS = {"0": " negative", "1": " positive"}
"""The completion of each label of SST-2."""

EVERY = 4
"""Every 4th prompt of E2E's test set is scored, with all its references; of SST-2 the whole dev set."""

HELD = 30_000
"""Characters of the held text: the first premises of RTE's dev set."""


def write(source: Path, out: Path, *, small: bool = False) -> None:
    """Write ``e2e/`` (CSV), ``sst2/`` (JSON lines) and ``held.txt`` into ``out``; equal files stay as they are.

    Args:
      source: the folder with E2E's devset.csv and testset_w_refs.csv in ``e2e``, and GLUE's SST-2 and RTE in ``glue``.
      out: the folder.
      small: write a few examples of each.
    """
    every, most, held = (100, 32, 1000) if small else (EVERY, None, HELD)
    glue = source / "glue"
    contents = {
        "e2e/devset.csv": _read(source / "e2e" / "devset.csv"),
        "e2e/testset_w_refs.csv": _some_prompts(source / "e2e" / "testset_w_refs.csv", every),
        "sst2/train.jsonl": _prompts(glue / "SST-2" / "train.tsv", most),
        "sst2/dev.jsonl": _prompts(glue / "SST-2" / "dev.tsv", most),
        "held.txt": "\n".join(row["sentence1"] for row in _rows(glue / "RTE" / "dev.tsv"))[:held],
    }
    for name, text in contents.items():
        path = out / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --data is the folder that holds e2e and glue") from None


def _some_prompts(path: Path, every: int) -> str:
    """Return a CSV of E2E with every ``every``-th of its different prompts, and all texts of each."""
    rows = [*csv.DictReader(io.StringIO(_read(path)))]
    prompts = [*dict.fromkeys(row["mr"] for row in rows)]
    chosen = set(prompts[::every])
    text = io.StringIO()
    writer = csv.DictWriter(text, ["mr", "ref"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in rows if row["mr"] in chosen)
    return text.getvalue()


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a TSV file of GLUE, in which quotes are text."""
    head, *lines = _read(path).rstrip("\n").split("\n")
    for line in lines:
        yield dict(zip(head.split("\t"), line.split("\t"), strict=False))


def _prompts(path: Path, most: int | None) -> str:
    """Return the sentences of SST-2 as JSON lines of prompts and completions."""
    examples = [
        {"prompt": f"Review: {row['sentence'].strip()}\nSentiment:", "completion": WORDS[row["label"]]}
        for row in _rows(path)
    ]
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples[:most])
