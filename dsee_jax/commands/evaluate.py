"""Compute the metrics of a finished run again, from its files."""

import argparse

from dsee_jax.errors import InputError
from dsee_jax.runtime import job

DESCRIPTION = (
    "Load model/ and adapter/ of a finished run, evaluate them on the dev sets of its config and print the metrics as "
    "JSON; with data.split_dev on the test halves. Needs the data of the run. --section.key=value overrides a key of "
    "the config, for instance --data.dir=NEW_DIR."
)
EXAMPLE = "python -m dsee_jax evaluate runs/demo --train.batch_size=64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    parser.add_argument(
        "--adapter", default="", metavar="DIR", help="an adapter of this library or of PEFT, in place of the run's own"
    )
    job.arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Print the metrics of a finished run."""
    from dsee_jax.runtime import files, multihost, storage
    from dsee_jax.train import finished_run

    multihost.join(options)
    with multihost.exit_on_failure(InputError):
        metrics = finished_run.evaluate(storage.download(options.run), options.overrides, other=options.adapter)
    if multihost.is_main():
        print(files.dumps(metrics, indent=1))
