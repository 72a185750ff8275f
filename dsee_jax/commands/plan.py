"""Predict memory and time of a run on devices you do not have, without weights and data."""

import argparse

from dsee_jax.errors import InputError
from dsee_jax.runtime import answer

DESCRIPTION = (
    "Compile the training step and the evaluation step of a config ahead of time, for the local devices or for a TPU "
    "topology you do not have, and print their costs: bytes per chip against the memory of a chip, FLOPs and memory "
    "traffic per step, every collective with its bytes and mesh axes, and a lower bound on the time of a step by a "
    "roofline. Needs no weights and no data: model.path may be a folder with only a config.json. --section.key=value "
    "overrides a key of the config."
)
EXAMPLE = "python -m dsee_jax plan configs/minilm_sst2_dsee.yaml --topology v5e:4x4"


MOST_LABELS = 10**6
"""The most classes of a plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("config", metavar="CONFIG", help="the YAML config of a run, as for train.py")
    parser.add_argument(
        "--topology",
        default="",
        metavar="KIND:SHAPE",
        help="a TPU topology, for instance v5e:4x4, v5e:16x16, v6e:16x16 or v5p:4x4x8; needs the extra `tpu`; default: the "
        "local devices",
    )
    parser.add_argument(
        "--labels", type=int, default=2, metavar="N", help="classes of a classifier; 1 = regression; default 2"
    )
    parser.add_argument(
        "--largest", action="store_true", help="also search for the largest batch that fits; compiles several times"
    )
    answer.arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Print the costs of the steps of a config."""
    from dsee_jax.plan import roofline, run
    from dsee_jax.train import config_file

    if not 1 <= options.labels <= MOST_LABELS:
        raise InputError(f"--labels is {options.labels}; expected 1 to {MOST_LABELS}")
    wanted = answer.wanted(options)
    config = config_file.read(options.config, options.overrides)
    figures = run.plan(config, options.topology, labels=options.labels)
    if options.largest:
        figures["largest_batch"] = run.largest_batch(config, options.topology, labels=options.labels)
    wanted.give(figures)
    for table in roofline.tables(figures):
        wanted.show(table)
