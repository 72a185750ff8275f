"""Print the tables of a finished run, and draw its pictures."""

import argparse

from dsee_jax.errors import InputError

DESCRIPTION = (
    "Print the scores and costs of a finished run, and draw pictures into its folder: the curves of loss and metrics, "
    "the kept heads and neurons, the fraction of zeros in every kernel, the search for a ticket. Pictures need the "
    "extra `plot`."
)
EXAMPLE = "python -m dsee_jax report runs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")


def run(options: argparse.Namespace) -> None:
    """Print the tables, draw the pictures and print their paths."""
    from dsee_jax.analysis import pictures
    from dsee_jax.ckpt.folders import METRICS, read_json
    from dsee_jax.runtime import console, storage
    from dsee_jax.train.report import show

    place, run = storage.as_path(options.run), storage.download(options.run)
    if not (run / METRICS).exists():
        raise InputError(f"{place} is no finished run: it has no {METRICS}")
    results = read_json(run / METRICS)
    try:
        show(results, place, console.show)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{place / METRICS} does not hold the results of a run ({problem}): run train.py again"
        ) from None
    for name, file in pictures.draw(run, console.show).items():
        if storage.remote(place):
            storage.upload(file, place / file.name)
        console.show(f"{name:8} {place / file.name}")
