"""Compare two checkpoints of one model, layer by layer."""

import argparse

DESCRIPTION = (
    "Compare two checkpoints of one model and print one row per layer: the relative change, the fraction of unchanged "
    "entries, the fraction of zeros, and the effective rank of the change (exp of the entropy of its singular "
    "values)."
)
EXAMPLE = "python -m dsee_jax inspect BASE TUNED --tensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("before", metavar="A", help="a model folder, GGUF file, hub id or package:NAME")
    parser.add_argument("after", metavar="B", help="another checkpoint of the same model, for instance after tuning")
    parser.add_argument("--tensors", action="store_true", help="print one row per tensor")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")


def run(options: argparse.Namespace) -> None:
    """Print the comparison of two checkpoints."""
    from dsee_jax.analysis import compare
    from dsee_jax.ckpt.resolve import resolve
    from dsee_jax.runtime import console, files, storage

    file = storage.target(options.json, "--json") if options.json else None
    comparison = compare.compare(resolve(options.before), resolve(options.after))
    if file:
        files.write(file, comparison)
    console.show(compare.table(comparison, every_tensor=options.tensors))
    for kind in ("only_before", "only_after"):
        if names := comparison[kind]:
            console.show(f"{kind.replace('_', ' ')}: {', '.join(names[:4])} ({len(names)} tensors)")
