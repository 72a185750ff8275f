"""BERT (arXiv 1810.04805) in plain Linen, numerically equal to Hugging Face's ``BertModel``. MiniLM encoders are BERTs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.hf_layout import KERNEL, PLAIN
from dsee_jax.models import encoder, task_heads
from dsee_jax.models.architecture import Architecture, HfNames, standard_cuts
from dsee_jax.models.encoder import Embeddings, Encoder


@dataclasses.dataclass(frozen=True)
class Config(encoder.Config):
    """The fields of BERT, see `encoder.Config`."""

    model_type = "bert"
    DROPOUTS: ClassVar[tuple[str, ...]] = (*encoder.Config.DROPOUTS, "classifier_dropout")

    classifier_dropout: float | None = None
    """None: hidden_dropout_prob."""

    @classmethod
    def fixed(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Return the fields of a ``config.json`` that are not implemented, with the values that change nothing."""
        return super().fixed(config) | {"position_embedding_type": ("absolute", None)}


class Bert(nn.Module):
    """BERT with the head of a task (`task_heads.TASKS` lists them)."""

    config: Config
    task: str = "sequence-classification"

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Run the model.

        Args:
          input_ids: int (batch, length), below ``vocab_size``; an id outside gives NaN.
          attention_mask: (batch, length), nonzero = a token, 0 = padding. None: all tokens.
          token_type_ids: int (batch, length), below ``type_vocab_size``. None: zeros.
          deterministic: no dropout. When false, pass ``rngs={"dropout": key}``.

        Returns:
          float32 logits, or the last hidden state: the outputs of `task_heads.head` for the task.

        Raises:
          InputError: the batch is longer than ``max_position_embeddings``.
        """
        config = self.config
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = jnp.arange(input_ids.shape[1])[None]
        x = Embeddings(config, name="embeddings")(input_ids, positions, types, deterministic)
        x = Encoder(config, name="encoder")(x, (mask != 0)[:, None, None, :], deterministic, task_heads.read(self.task))

        def pool(first: jax.Array) -> jax.Array:
            return jnp.tanh(task_heads.dense(config, config.hidden_size, "pooler")(first))

        return task_heads.head(config, self.task, x, deterministic, pool=pool, rate=config.classifier_dropout)


_LAYER = "encoder/layer_{i}"
_DENSE = (
    ("attention/query", "attention.self.query"),
    ("attention/key", "attention.self.key"),
    ("attention/value", "attention.self.value"),
    ("attention/output", "attention.output.dense"),
    ("mlp/up", "intermediate.dense"),
    ("mlp/down", "output.dense"),
)
_NORM = (
    ("embeddings/norm", "bert.embeddings.LayerNorm"),
    (f"{_LAYER}/attention_norm", "bert.encoder.layer.{i}.attention.output.LayerNorm"),
    (f"{_LAYER}/mlp_norm", "bert.encoder.layer.{i}.output.LayerNorm"),
)


def dense(path: str, name: str) -> HfNames:
    """Return the rows of `Architecture.hf_names` for a kernel and its bias."""
    return (f"{path}/kernel", f"{name}.weight", KERNEL), (f"{path}/bias", f"{name}.bias", PLAIN)


BACKBONE: HfNames = (
    ("embeddings/word/embedding", "bert.embeddings.word_embeddings.weight", PLAIN),
    ("embeddings/position/embedding", "bert.embeddings.position_embeddings.weight", PLAIN),
    ("embeddings/token_type/embedding", "bert.embeddings.token_type_embeddings.weight", PLAIN),
    *(row for path, name in _DENSE for row in dense(f"{_LAYER}/{path}", f"bert.encoder.layer.{{i}}.{name}")),
    *((f"{path}/bias", f"{name}.bias", PLAIN) for path, name in _NORM),
    *((f"{path}/scale", f"{name}.weight", PLAIN) for path, name in _NORM),
)
"""The rows of `Architecture.hf_names` outside the heads."""


ARCHITECTURE = Architecture(
    config=Config,
    model=Bert,
    model_types={"bert": "Bert"},
    tasks=task_heads.TASKS,
    head=task_heads.HEAD,
    prefix="bert.",
    hf_names=(
        *BACKBONE,
        *dense("pooler", "bert.pooler.dense"),
        *dense("classifier", "classifier"),
        *dense("token_classifier", "classifier"),
        *dense("span", "qa_outputs"),
    ),
    axes=(
        (r"embeddings/word/embedding", ("vocab", "embed")),
        (r"embeddings/(position|token_type)/embedding", (None, "embed")),
        (r"(.*/)?(norm|attention_norm|mlp_norm)/(scale|bias)", ("embed",)),
        (r".*/attention/(query|key|value)/kernel", ("embed", "heads")),
        (r".*/attention/(query|key|value)/bias", ("heads",)),
        (r".*/attention/output/kernel", ("heads", "embed")),
        (r".*/mlp/up/kernel", ("embed", "mlp")),
        (r".*/mlp/up/bias", ("mlp",)),
        (r".*/mlp/down/kernel", ("mlp", "embed")),
        (r".*/(attention/output|mlp/down)/bias", ("embed",)),
        *task_heads.AXES,
    ),
    cuts=standard_cuts(_LAYER),
    # The constant 0, 1, 2 ..., and the pretraining heads.
    ignored_names=(r"(.*\.)?position_ids", r"cls\..*"),
)
