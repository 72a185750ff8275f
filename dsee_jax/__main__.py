"""Work with finished runs, checkpoints and configs: ``python -m dsee_jax VERB ...``."""

import argparse
import sys

from dsee_jax.commands import evaluate, export, generate, inspect, plan, report, statistics
from dsee_jax.errors import InputError
from dsee_jax.runtime import malloc
from dsee_jax.runtime.storage import StoreError

VERBS = {
    module.__name__.rpartition(".")[2]: module
    for module in (evaluate, export, report, inspect, statistics, generate, plan)
}
OVERRIDES = ("evaluate", "statistics", "plan")
"""The verbs that accept ``--section.key=value`` overrides of a config."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="python -m dsee_jax",
        description="Work with finished runs, checkpoints and configs. VERB --help explains a verb.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        summary = (module.__doc__ or "").rstrip(".")
        example = f"example: {module.EXAMPLE}"
        module.add_arguments(verbs.add_parser(name, help=summary, description=module.DESCRIPTION, epilog=example))
    return top


def main(arguments: list[str]) -> int:
    """Return the exit status: 0; 2 for bad input (one line on stderr, no output written); 1 if a store rejects the output."""
    options, rest = parser().parse_known_args(arguments)
    malloc.keep_freed_memory()
    try:
        if rest and options.verb not in OVERRIDES:
            raise InputError(f"{options.verb} does not accept {rest[0]!r}; see --help")
        options.overrides = rest
        VERBS[options.verb].run(options)
    except InputError as error:
        print(f"dsee_jax {options.verb}: {error}", file=sys.stderr)
        return 2
    except StoreError as error:
        print(f"dsee_jax {options.verb}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
