"""Limits on the time and memory of a chat template, which is a program of the tokenizer's author."""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from dsee_jax.runtime import limits

SECONDS = 10.0
"""The most time of one rendering; usual templates take milliseconds."""

MEMORY = 1 << 30
"""The most address space that a rendering adds, in bytes; where the system has such a limit."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise `TimeoutError` or `MemoryError` in a Jinja template that runs in the body beyond `SECONDS` or `MEMORY`."""
    end, before = time.monotonic() + SECONDS, sys.gettrace()

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        del event, argument
        # Jinja compiles a template to a Python function of this file name.
        if frame.f_code.co_filename not in ("<template>", "<unknown>"):
            return None
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {SECONDS:g} s")
        return watch

    with _memory(MEMORY):
        sys.settrace(watch)
        try:
            yield
        finally:
            sys.settrace(before)


@contextlib.contextmanager
def _memory(more: int) -> Iterator[None]:
    """Let this process take at most ``more`` bytes of address space beyond the present ones, where the system can tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        yield
        return
    used = limits.used()
    if not used:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + more
    if resource.RLIM_INFINITY not in (soft, limit):
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
