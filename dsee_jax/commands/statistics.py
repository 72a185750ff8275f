"""Collect what the merges fisher and regmean need."""

import argparse

DESCRIPTION = (
    "Run the model of a finished run over training examples and write what merging weighs by: fisher, the diagonal "
    "Fisher information of every tensor, or gram, the mean of x x^T over the inputs of every kernel. Keys of the config "
    "can be overridden, for instance --data.dir=ELSEWHERE."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    parser.add_argument("out", metavar="OUT", help="the safetensors file to make")
    parser.add_argument(
        "--kind", choices=["fisher", "gram"], required=True, help="for the merge fisher, or for regmean"
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=256,
        metavar="N",
        help="how many, drawn with the run's seed; 0: all; default 256",
    )


def run(options: argparse.Namespace) -> None:
    """Run the verb with its parsed flags."""
    from dsee_jax.analysis import statistics
    from dsee_jax.runtime import storage

    run = storage.download(options.run)
    with storage.written(options.out, overwrite=False) as out:
        about = statistics.write(run, out, options.kind, examples=options.examples, overrides=options.overrides)
    print(f"{options.out}: {about['kind']} of {about['examples']} examples of {about['task']}")
