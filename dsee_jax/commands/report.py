"""Print the tables of a finished run again, and draw it."""

import argparse

from dsee_jax.errors import InputError

DESCRIPTION = (
    "Print the scores and costs of a finished run, and draw pictures into its folder (extra `plot`): its curves, which "
    "heads and neurons were kept, the share of zeros of every kernel, the search for a ticket."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")


def run(options: argparse.Namespace) -> None:
    """Run the verb with its parsed flags."""
    from dsee_jax.analysis import pictures
    from dsee_jax.ckpt.folders import read_json
    from dsee_jax.runtime import console, storage
    from dsee_jax.train.report import final

    place, run = storage.as_path(options.run), storage.download(options.run)
    if not (run / "metrics.json").exists():
        raise InputError(f"{place} is no finished run: it has no metrics.json")
    final(read_json(run / "metrics.json"), place, console.show)
    for name, file in pictures.draw(run, console.show).items():
        if storage.remote(place):
            storage.upload(file, place / file.name)
        console.show(f"{name:8} {place / file.name}")
