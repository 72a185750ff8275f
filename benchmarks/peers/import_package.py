"""Side: importing one or more packages in a new process, without the start of Python."""

import importlib
import os
import time
from typing import Any

from benchmarks.peers import child


def prepare(case: dict[str, Any]) -> child.Side:
    os.environ["KERAS_BACKEND"] = "jax"
    begin = time.perf_counter()
    for name in case["packages"]:
        module = importlib.import_module(name)
        if "attribute" in case:
            getattr(module, case["attribute"])
    seconds = time.perf_counter() - begin
    facts = {"imports": case["packages"], "attribute": case.get("attribute"), "versions": child.versions()}
    return child.Side(child.once({"seconds": seconds}), facts, {})


if __name__ == "__main__":
    child.serve(prepare)
