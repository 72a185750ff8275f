"""XLM-RoBERTa (arXiv 1911.02116): RoBERTa of many languages, under a ``model_type`` of its own."""

import dataclasses

from dsee_jax.models import roberta


@dataclasses.dataclass(frozen=True)
class Config(roberta.Config):
    """The fields of RoBERTa."""

    model_type = "xlm-roberta"


ARCHITECTURE = dataclasses.replace(roberta.ARCHITECTURE, config=Config, model_types={"xlm-roberta": "XLMRoberta"})
