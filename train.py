"""Run every stage of a config: ``python train.py CONFIG.yaml [--section.key=value ...]``; without CONFIG, the demo."""

import argparse
import logging
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run the config and return the exit status.

    0: done. 1: a store failed, or another process of the job died. 2: bad input; stderr has one line and nothing is written.
    143: stopped by SIGTERM, after a checkpoint was saved.
    """
    parser = argparse.ArgumentParser(
        description="Fine-tune a pretrained transformer with DSEE: tune -> prune -> retune -> evaluate -> export. "
        "The same command with the same output_dir resumes the run; finished work is not repeated.",
        epilog="Options of the form --section.key=value override the config, as in --train.seed=1 --delta.rank=8. "
        "--keys lists all keys.",
    )
    demo = Path(__file__).parent / "configs" / "demo.yaml"
    parser.add_argument("config", nargs="?", default=demo, help="a YAML file (default: configs/demo.yaml)")
    parser.add_argument("--keys", action="store_true", help="list every key with its default and meaning, and exit")

    from dsee_jax.errors import InputError
    from dsee_jax.runtime import malloc, multihost, preemption, storage
    from dsee_jax.train import config_file

    multihost.arguments(parser)
    options, overrides = parser.parse_known_args(arguments)

    if options.keys:
        print(config_file.describe())
        return 0
    malloc.keep_freed_memory()
    # Log messages of the library (a new task head) belong to the report on stdout; stderr is for errors.
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    try:
        settings = config_file.read(options.config, overrides)
        multihost.join(options)
        if not multihost.is_main():
            logging.getLogger().setLevel(logging.ERROR)
        from dsee_jax.runtime import console
        from dsee_jax.train import loop

        with multihost.exit_on_failure(InputError, preemption.Preempted):
            loop.run(settings, say=console.show)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except storage.StoreError as error:
        print(f"train.py: {error}; the same command resumes from the last checkpoint", file=sys.stderr)
        return 1
    except preemption.Preempted as stopped:
        print(f"train.py: SIGTERM: saved at {stopped}; the same command resumes from there", file=sys.stderr)
        return preemption.STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
