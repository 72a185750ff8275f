"""XLM-RoBERTa (arXiv 1911.02116): RoBERTa of many languages, which Hugging Face keeps under a name of its own."""

import dataclasses
from typing import ClassVar

from dsee_jax.models import roberta
from dsee_jax.models.roberta import AXES, CUTS, HEAD, HF_NAMES, IGNORED_NAMES, OLD_NAMES, PREFIX, Model

__all__ = [
    "ARCHITECTURES",
    "AXES",
    "CUTS",
    "HEAD",
    "HF_NAMES",
    "IGNORED_NAMES",
    "OLD_NAMES",
    "PREFIX",
    "Config",
    "Model",
]


@dataclasses.dataclass(frozen=True)
class Config(roberta.Config):
    """The fields of RoBERTa."""

    model_type: ClassVar[str] = "xlm-roberta"


ARCHITECTURES = {task: f"XLM{name}" for task, name in roberta.ARCHITECTURES.items()}
"""Task -> Hugging Face's class."""
