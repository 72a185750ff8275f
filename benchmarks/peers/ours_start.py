"""Side: a run of this library from the start of its process to the end of its first step, as ``train.py`` starts it."""

import contextlib
import os
import sys
from typing import Any

from benchmarks.peers import child

INCLUDES = (
    "Python, imports, config, model, data and tokenising, supports by GreBsmo, evaluation before tuning, first checkpoint, "
    "compiling or the compilation cache, first step"
)


class _Done(Exception):
    """The first step is done."""


def prepare(case: dict[str, Any]) -> child.Side:
    kept = "compiled" if case["cache"] == "filled" else f"compiled-{os.getpid()}"
    os.environ["XDG_CACHE_HOME"] = os.path.join(case["scratch"], kept)
    from dsee_jax.runtime import compilation_cache, malloc
    from dsee_jax.train import config_file, loop, trainer
    from dsee_jax.train.trackers import Tracker

    malloc.keep_freed_memory()
    compilation_cache.enable()
    settings = {
        "model.path": case["model"],
        "model.new_head": True,
        "data.source": "glue",
        "data.task": case["task"],
        "data.dir": case["data"],
        "train.batch_size": case["batch"],
        "output_dir": os.path.join(case["scratch"], f"run-{os.getpid()}"),
    }
    config = config_file.read(None, [f"--{key}={value}" for key, value in settings.items()])
    seconds = 0.0

    def log(figures: Any, step: int) -> None:
        nonlocal seconds
        if "train/learning_rate" in figures:
            seconds = child.age()
            raise _Done

    # A log line after the first step tells that it is done.
    trainer.LOG_EVERY = 1
    with contextlib.suppress(_Done):
        loop.run(config, say=lambda text: None, tracked=[Tracker(log, lambda well: None)])
    assert seconds, "a run has a step"
    facts = {
        "start": INCLUDES,
        "cache": case["cache"],
        # transformers, whose tokenizer a run reads, imports PyTorch where it is installed, which takes seconds.
        "torch": "imported" if "torch" in sys.modules else "not imported",
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("jax", "jaxlib", "flax"),
    }
    return child.Side(child.once({"seconds": seconds}), facts, {})


if __name__ == "__main__":
    child.serve(prepare)
