"""Compare two checkpoints of one model, layer by layer."""

import argparse

from dsee_jax.runtime import answer

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
    answer.arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Print the comparison of two checkpoints."""
    from dsee_jax.analysis import compare
    from dsee_jax.ckpt.resolve import resolve

    wanted = answer.wanted(options)
    comparison = compare.compare(resolve(options.before), resolve(options.after))
    wanted.give(comparison)
    wanted.show(compare.table(comparison, every_tensor=options.tensors))
    for kind in ("only_before", "only_after"):
        if names := comparison[kind]:
            wanted.show(f"{kind.replace('_', ' ')}: {', '.join(names[:4])} ({len(names)} tensors)")
