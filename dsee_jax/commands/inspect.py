"""Compare two checkpoints, layer by layer."""

import argparse

DESCRIPTION = (
    "Compare two checkpoints of one model: relative change, share of entries that did not change, zeros, and effective "
    "rank of the change (exp of the entropy of its singular values), a row a layer."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("before", metavar="A", help="a model folder, hub id or package:NAME")
    parser.add_argument("after", metavar="B", help="the same, tuned")
    parser.add_argument("--tensors", action="store_true", help="a row a tensor instead of a layer")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as well")


def run(options: argparse.Namespace) -> None:
    """Run the verb with its parsed flags."""
    from dsee_jax.analysis import compare
    from dsee_jax.ckpt.resolve import resolve
    from dsee_jax.runtime import console, files, storage

    file = storage.target(options.json, "--json") if options.json else None
    found = compare.compare(resolve(options.before), resolve(options.after))
    if file:
        files.write(file, found)
    console.show(compare.table(found, every_tensor=options.tensors))
    for kind in ("only_before", "only_after"):
        if found[kind]:
            console.show(f"{kind.replace('_', ' ')}: {', '.join(found[kind][:4])} ({len(found[kind])} tensors)")
