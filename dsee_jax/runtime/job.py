"""The flags of a distributed job; `dsee_jax.runtime.multihost` joins the job. Without JAX, so that ``--help`` is quick."""

import argparse

JOIN = 300
"""Seconds that a process waits for the start of all others."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `multihost.join` reads."""
    group = parser.add_argument_group(
        "distributed jobs", "Each host of a job runs this command, with a disk that all hosts share."
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the job that a TPU pod, SLURM, Kubernetes or Open MPI announces, or JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="the address of process 0; implies --distributed")
    group.add_argument("--processes", type=int, metavar="N", help="the number of processes")
    group.add_argument("--process", type=int, metavar="I", help="the number of this process, 0 to N - 1")
    group.add_argument(
        "--join-timeout",
        type=float,
        metavar="SECONDS",
        default=JOIN,
        help=f"how long to wait until all processes of the job have started; default {JOIN}",
    )


def is_named(options: argparse.Namespace) -> bool:
    """Return whether the flags name a job; a command without these flags has none."""
    flags = ("coordinator", "processes", "process")
    return getattr(options, "distributed", False) or any(getattr(options, flag, None) is not None for flag in flags)
