"""Compile a run's training step ahead of time, and tell what it takes and what bounds it."""

import argparse

DESCRIPTION = (
    "Lower and compile the training step of a config with no weights and no data, for the devices here or for a TPU "
    "topology that need not be there, and tell: bytes a chip against its memory, operations and bytes of a step, every "
    "collective with its bytes and mesh axis, the roofline and what bounds it. model.path may be a folder with a "
    "config.json alone. Keys of the config can be overridden, for instance --mesh.fsdp=16."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file of train.py")
    parser.add_argument(
        "--topology", default="", metavar="KIND:SHAPE", help="v5e:4x4, v5e:16x16, v6e:16x16, v5p:4x4x8 (extra `tpu`)"
    )
    parser.add_argument("--labels", type=int, default=2, metavar="N", help="of a classifier; 1: regression; default 2")
    parser.add_argument(
        "--largest", action="store_true", help="search for the largest batch that fits; compiles several times"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there as well")


def run(options: argparse.Namespace) -> None:
    """Run the verb with its parsed flags."""
    from dsee_jax.plan import roofline, run
    from dsee_jax.runtime import console, files, storage
    from dsee_jax.train import config_file

    file = storage.target(options.json, "--json") if options.json else None
    asked = config_file.read(options.config, options.overrides)
    found = run.plan(asked, options.topology, labels=options.labels)
    if options.largest:
        found["largest_batch"] = run.largest(asked, options.topology, labels=options.labels)
    if file:
        files.write(file, found)
    for table in roofline.tables(found):
        console.show(table)
