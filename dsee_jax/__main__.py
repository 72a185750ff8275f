"""Work with finished runs, checkpoints and configs: ``python -m dsee_jax VERB ...``."""

import argparse
import ast
from pathlib import Path
from typing import NoReturn

from dsee_jax.commands import evaluate, export, generate, inspect, plan, report, statistics
from dsee_jax.errors import InputError
from dsee_jax.runtime import command, compilation_cache, completion, malloc

VERBS = {
    module.__name__.rpartition(".")[2]: module
    for module in (evaluate, export, report, inspect, statistics, generate, plan)
}
OVERRIDES = ("evaluate", "statistics", "plan")
"""The verbs that accept ``--section.key=value`` overrides of a config."""
NOT_CACHED = ("report", "plan")
"""The verbs without a cache of compiled programs: one compiles nothing, and the other measures the compilation."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="python -m dsee_jax",
        description="Work with finished runs, checkpoints and configs. VERB --help explains a verb.",
    )

    def add_keys() -> None:
        from dsee_jax.train import config_file

        for name in OVERRIDES:
            completion.add_keys(verbs.choices[name], config_file.keys())

    completion.arguments(top, "dsee-jax", add_keys)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        # Read from the source: `python -OO` drops docstrings.
        summary = str(ast.get_docstring(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")))).rstrip(".")
        example = f"example: {module.EXAMPLE}"
        verb = verbs.add_parser(name, help=summary, description=module.DESCRIPTION, epilog=example)
        module.add_arguments(verb)
        if name not in NOT_CACHED:
            compilation_cache.arguments(verb)
    return top


def main(arguments: list[str]) -> int:
    """Return the exit status of `command.run`."""
    words, overrides = command.split(arguments)
    options, rest = parser().parse_known_args(words)
    return command.run(f"dsee_jax {options.verb}", arguments, lambda: _main(options, [*rest, *overrides]))


def console_script() -> NoReturn:
    """Run the command line of ``dsee-jax``."""
    command.start(main)


def _main(options: argparse.Namespace, rest: list[str]) -> None:
    malloc.keep_freed_memory()
    if rest and options.verb not in OVERRIDES:
        raise InputError(f"{options.verb} does not accept {rest[0]!r}; see --help")
    options.overrides = rest
    if options.verb not in NOT_CACHED:
        compilation_cache.use(options)
    VERBS[options.verb].run(options)


if __name__ == "__main__":
    console_script()
