"""Write the model of a run for another tool."""

import argparse

DESCRIPTION = "Write a finished run's model as one folder, for another tool."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--format",
        choices=["hf", "compact", "stablehlo", "peft"],
        default="hf",
        help="hf: any tool opens it, what was cut out is zeros again; compact: only what was kept, for this library; "
        "stablehlo: a program for any batch and length that runs with jax alone; peft: the low-rank updates and the head of a "
        "run without sparse values and pruning",
    )
    parser.add_argument(
        "--factors",
        action="store_true",
        help="keep the pruned weights sparse and put the updates beside them in OUT/adapter; "
        "without it they are folded in, and any tool gets the tuned logits",
    )


def run(options: argparse.Namespace) -> None:
    """Run the verb with its parsed flags."""
    from dsee_jax.export import run
    from dsee_jax.runtime import storage

    with storage.written(options.out, overwrite=False) as out:
        run.export(storage.download(options.run), out, form=options.format, factors=options.factors)
    print(options.out)
