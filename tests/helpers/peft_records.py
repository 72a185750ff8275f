"""The keys that the reader of PEFT's method comparison (``method_comparison/processing.py``) takes of a record."""

from collections.abc import Mapping
from typing import Any

MEMORY = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")
NUMBERS = (
    *(("run_info", "total_time"), *(("train_info", name) for name in MEMORY)),
    *(("train_info", name) for name in ("train_time", "file_size", "num_trainable_params")),
    *(("train_info", "metrics", -1, name) for name in ("train loss", "train samples", "train total tokens")),
)
"""Not null: the reader makes numbers of them."""
NAMES = (
    *(("run_info", name) for name in ("experiment_name", "peft_config", "peft_branch", "created_at")),
    ("run_info", "train_config", "model_id"),
    *(("train_info", "status"), ("train_info", "metrics", -1, "test accuracy"), ("meta_info", "system_info")),
    *(
        ("meta_info", "package_info", f"{name}-version")
        for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")
    ),
)
"""May be null."""


def unreadable(record: Mapping[str, Any]) -> list[str]:
    """Return the keys that a record lacks, and the numbers that it has as null."""
    return ["/".join(map(str, keys)) for keys in (*NUMBERS, *NAMES) if not _reads(record, keys, null=keys in NAMES)]


def _reads(record: Any, keys: tuple[str | int, ...], *, null: bool) -> bool:
    try:
        for key in keys:
            record = record[key]
    except KeyError:
        return False
    return null or record is not None
