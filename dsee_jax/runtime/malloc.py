"""What the C library does with memory that a program gives back."""

import ctypes
import os
import platform

MAPPED, KEPT = 32 << 20, 1 << 30
"""Bytes: allocations from this size on are mapped, and go back to the system when freed; of others so much is kept free."""


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees for its next use; return whether it does.

    Nothing is done with another C library, nor where the environment sets ``MALLOC_TRIM_THRESHOLD_``: that choice stays.

    On the CPU, a program of XLA takes scratch for its products and frees it at every call. glibc gives it back to the system
    and then gets it again page by page, each a fault: on two cores a quarter of the time of evaluating a BERT. Commands call
    this at their start; in a process of your own, call it or begin the process with ``MALLOC_TRIM_THRESHOLD_=1073741824``.
    Freed blocks of `MAPPED` bytes and more still go back at once. See mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    library, mmap_threshold, trim_threshold = ctypes.CDLL(None), -3, -1
    return bool(library.mallopt(mmap_threshold, MAPPED) and library.mallopt(trim_threshold, KEPT))
