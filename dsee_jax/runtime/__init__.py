"""The machine: paths of disks and stores, processes of a job, signals, files written whole or not at all, the console."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
