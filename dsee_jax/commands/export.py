"""Write the model of a finished run in the format of another tool."""

import argparse
import pathlib

from dsee_jax.errors import InputError
from dsee_jax.runtime import hub

DESCRIPTION = (
    "Write the model of a finished run to a new folder: as a Hugging Face model, a compact checkpoint, a StableHLO "
    "program or a PEFT adapter. Needs the folder of the run and its data files."
)
EXAMPLE = "python -m dsee_jax export runs/demo OUT --format hf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument(
        "--format",
        choices=["hf", "compact", "stablehlo", "peft"],
        default="hf",
        help="hf: a Hugging Face folder for any tool, with zeros for pruned heads or neurons whose number its fields cannot "
        "hold; compact: a folder without any pruned units, for this library; stablehlo: a program for any batch "
        "and length that needs only jax; "
        "peft: the updates and the task head, for the pretrained model or, if weights were pruned, RUN_DIR/model; default hf",
    )
    parser.add_argument(
        "--factors",
        action="store_true",
        help="hf and compact: keep the pruned weights sparse and write the updates to OUT/adapter; by default the updates are "
        "folded into the weights, so that any tool computes the tuned logits",
    )
    parser.add_argument(
        "--base",
        default="",
        metavar="HUB_ID",
        help="peft: the hub id of the base, which the adapter names; default: the path of the pretrained model or, if weights "
        "were pruned, of RUN_DIR/model, which other machines do not have",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if an earlier export wrote everything in it"
    )
    hub.arguments(parser, "OUT")


def run(options: argparse.Namespace) -> None:
    """Write the folder and print its path; with ``--push`` upload it and print its address."""
    from dsee_jax.export.run import export_run
    from dsee_jax.runtime import storage

    if options.push is not None:
        hub.check(options.push)
        if storage.remote(options.out):
            raise InputError(f"--push uploads a folder of this machine, and {options.out} is in a store: give a folder")
    export_run(
        *(options.run, options.out),
        form=options.format,
        factors=options.factors,
        base=options.base,
        overwrite=options.overwrite,
    )
    print(options.out)
    if options.push is not None:
        print(hub.push(pathlib.Path(options.out).expanduser(), options.push))
