"""The machine: paths of disks and stores, processes of a job, signals, memory, atomic writes, the console."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
