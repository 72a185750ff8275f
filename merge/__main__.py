"""``python -m merge RECIPE.yaml OUT_DIR``: merge fine-tuned models of one base by a recipe, from files to files."""

import argparse
import signal
import sys
from typing import NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Nothing is written before the imports end: Ctrl-C stops them at once, and not with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dsee_jax.runtime import answer, command, compilation_cache, completion, hub, job
from merge import mergekit_flags

EXAMPLE = """\
a recipe, in mergekit's grammar:

  merge_method: rankmean        # see --methods
  base_model: BASE              # a folder beside the recipe or in the working folder, a hub id, or any of these +ADAPTER
  models:
    - model: TUNED_A
    - model: TUNED_B

After an interruption the same command resumes. `python -m merge compare A B` prints the difference of two checkpoints.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of a merge."""
    top = argparse.ArgumentParser(
        prog="python -m merge",
        description="Merge fine-tuned models of one base by a recipe, from files to files, one tensor at a time.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("recipe", metavar="RECIPE", help="YAML; mergekit's recipes run unmodified")
    top.add_argument("out", metavar="OUT_DIR", help="the output folder; appears when the merge is complete")
    top.add_argument("--plan", action="store_true", help="read headers only, and print the plan")
    top.add_argument(
        "--topology",
        metavar="KIND:SHAPE",
        help="with --plan: also print the accelerator memory of a merge of all models in memory, compiled for a TPU topology "
        "you do not have (v5e:4x4; extra `tpu`), or for the local devices (`here`)",
    )
    answer.arguments(top, only="with --plan: ")
    top.add_argument("--overwrite", action="store_true", help="replace OUT_DIR when the merge is complete")
    top.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="maximum size of a file of weights; default 5GB"
    )
    top.add_argument("--allow-nonfinite", action="store_true", help="merge NaN and infinities instead of refusing them")
    top.add_argument(
        "--heads",
        metavar="MODEL",
        help="if models have different heads (classes, shapes, or one has none), only the bodies are merged, and the head, "
        "class and labels are those of MODEL, a model of the recipe; first: of the first fine-tuned model with a head, the "
        "default for models of different classes; drop: no head",
    )
    hub.arguments(top, "OUT_DIR")
    _allow_changed_base(top)
    compilation_cache.arguments(top)
    job.arguments(top)
    mergekit_flags.add(top)
    top.add_argument("--methods", action=_Methods, nargs=0, help="list the methods and their options, and exit")
    completion.arguments(top, "dsee-merge")
    return top


def _allow_changed_base(top: argparse.ArgumentParser) -> None:
    top.add_argument(
        "--allow-changed-base",
        action="store_true",
        help="put an adapter of this library on other weights than those that it was trained on, instead of refusing",
    )


class _Methods(argparse.Action):
    def __call__(self, *ignored: object) -> None:
        from merge.methods import METHODS

        for name, method in sorted(METHODS.items()):
            print(f"{name}: {method.help}")
            for key, option in {**method.each, **method.shared}.items():
                default = "required" if option.default is None else f"default {option.default}"
                each = ", for each model" * (key in method.each)
                print(f"    {key}: {option.help} ({option.expected}{each}; {default})")
        sys.exit(0)


def compare_parser() -> argparse.ArgumentParser:
    """Return the parser of a comparison."""
    top = argparse.ArgumentParser(
        prog="python -m merge compare", description="Print the difference of two checkpoints."
    )
    top.add_argument("a", metavar="A", help="a folder, a hub id, or any of these +ADAPTER")
    top.add_argument("b", metavar="B", help="the same; changes are relative to A")
    top.add_argument(
        "--unit", default="layer", help="layer (default), tensor, or a regular expression with a group unit"
    )
    answer.arguments(top)
    _allow_changed_base(top)
    compilation_cache.arguments(top)
    return top


def main(arguments: list[str]) -> int:
    """Return the exit status of `command.run`; after an error there is no OUT_DIR."""
    compares = arguments[:1] == ["compare"]
    # Help and wrong words end here, before JAX is imported.
    options = compare_parser().parse_args(arguments[1:]) if compares else parser().parse_args(arguments)

    def work() -> None:
        from merge import run

        (run.print_comparison if compares else run.merge)(options)

    return command.run("merge", arguments, work, resume="" if compares else "the same command resumes")


def console_script() -> NoReturn:
    """Run the command line of ``dsee-merge``."""
    command.start(main)


if __name__ == "__main__":
    console_script()
