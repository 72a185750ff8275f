"""Write the statistics that the merge methods fisher and regmean need."""

import argparse

DESCRIPTION = (
    "Run the model of a finished run over training examples and write the weights of a merge: fisher, the diagonal "
    "Fisher information of every tensor, or gram, the mean of x x^T over the inputs x of every kernel. Needs the data "
    "of the run. --section.key=value overrides a key of the config, for instance --data.dir=NEW_DIR."
)
EXAMPLE = "python -m dsee_jax statistics runs/demo fisher.safetensors --kind fisher"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    parser.add_argument("out", metavar="OUT", help="the new safetensors file")
    parser.add_argument(
        "--kind",
        choices=["fisher", "gram"],
        required=True,
        help="fisher for the method fisher, gram for the method regmean",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=256,
        metavar="N",
        help="number of training examples, drawn with the seed of the run; 0 = all; default 256",
    )


def run(options: argparse.Namespace) -> None:
    """Write the file and print its kind, number of examples and task."""
    from dsee_jax.analysis import statistics
    from dsee_jax.runtime import storage

    storage.target(options.out, "OUT")
    run = storage.download(options.run)
    with storage.written(options.out, overwrite=False) as out:
        about = statistics.write(run, out, options.kind, examples=options.examples, overrides=options.overrides)
    print(f"{options.out}: {about['kind']} of {about['examples']} examples of {about['task']}")
