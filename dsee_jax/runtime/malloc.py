"""Keep freed memory in the process (glibc)."""

import ctypes
import os
import platform

MAPPED, KEPT = 32 << 20, 1 << 30
"""Bytes: allocations of at least `MAPPED` are memory-mapped and returned to the system when freed; of the others, up to
`KEPT` freed bytes stay in the process."""


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees, for its next allocations; return whether it does.

    With another C library nothing changes; with ``MALLOC_TRIM_THRESHOLD_`` in the environment the user's choice stays.

    On the CPU, an XLA program allocates scratch memory for its matrix products and frees it in every call. By default glibc
    returns this memory to the system and gets it again page by page, each with a page fault: on two cores a quarter of the
    time of evaluating a BERT. Commands call this function at their start; in your own process, call it, or start the process
    with ``MALLOC_TRIM_THRESHOLD_=1073741824``. Freed blocks of `MAPPED` bytes or more still return to the system at once.
    See mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    library, mmap_threshold, trim_threshold = ctypes.CDLL(None), -3, -1
    return bool(library.mallopt(mmap_threshold, MAPPED) and library.mallopt(trim_threshold, KEPT))
