"""Run every stage of a config: ``python train.py CONFIG.yaml [--section.key=value ...]``; without CONFIG, the demo."""

import argparse
import logging
import sys
from pathlib import Path

from dsee_jax.runtime import command


def main(arguments: list[str]) -> int:
    """Run the config and return the exit status of `command.run`; 143: stopped by SIGTERM, after a checkpoint was saved."""
    resume = "the same command resumes from the last checkpoint"
    words, overrides = command.split(arguments)
    options, rest = parser().parse_known_args(words)
    return command.run("train.py", arguments, lambda: _main(options, [*rest, *overrides]), resume=resume)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    from dsee_jax.runtime import compilation_cache, job

    top = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune a pretrained transformer with DSEE: tune -> prune -> retune -> evaluate -> export. "
        "The same command with the same output_dir resumes the run; finished work is not repeated.",
        epilog="Options of the form --section.key=value override the config, as in --train.seed=1 --delta.rank=8. "
        "--keys lists all keys.",
    )
    demo = Path(__file__).parent / "configs" / "demo.yaml"
    top.add_argument("config", nargs="?", default=demo, help="a YAML file (default: configs/demo.yaml)")
    top.add_argument("--keys", action="store_true", help="list every key with its default and meaning, and exit")
    compilation_cache.arguments(top)
    job.arguments(top)
    return top


def _main(options: argparse.Namespace, overrides: list[str]) -> None:
    from dsee_jax.errors import InputError, Stopped
    from dsee_jax.runtime import compilation_cache, malloc, multihost
    from dsee_jax.train import config_file

    if options.keys:
        print(config_file.describe())
        return
    malloc.keep_freed_memory()
    # Log messages of the library (a new task head) belong to the report on stdout; stderr is for errors.
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    settings = config_file.read(options.config, overrides)
    compilation_cache.use(options)  # before the first program, which a job compiles when it begins
    multihost.join(options)
    if not multihost.is_main():
        logging.getLogger().setLevel(logging.ERROR)
    from dsee_jax.train import loop

    with multihost.exit_on_failure(InputError, Stopped):
        loop.run(settings)


if __name__ == "__main__":
    command.start(main)
