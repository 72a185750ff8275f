"""Print the final metrics again, from the files of a run."""

import argparse
import json

from dsee_jax.errors import InputError

DESCRIPTION = (
    "Load model/ and adapter/ of a finished run, evaluate them on the dev set of its config and print the metrics as "
    "JSON. Keys of the config can be overridden, for instance --data.max_length=64 or --data.dir=ELSEWHERE."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    from dsee_jax.runtime import multihost

    multihost.arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Run the verb with its parsed flags."""
    from dsee_jax.runtime import multihost, storage
    from dsee_jax.train import reopen

    multihost.join(options)
    with multihost.exit_on_failure(InputError):
        found = reopen.evaluate(storage.download(options.run), options.overrides)
    if multihost.is_main():
        print(json.dumps(found, indent=1))
