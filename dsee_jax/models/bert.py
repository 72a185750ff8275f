"""BERT (arXiv 1810.04805) in plain Linen, numerically Hugging Face's ``BertModel``; MiniLM encoders are the same model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.hf_layout import KERNEL, PLAIN, Layout
from dsee_jax.models import encoder, task_heads
from dsee_jax.models.encoder import Embeddings, Encoder


@dataclasses.dataclass(frozen=True)
class Config(encoder.Config):
    """The fields of BERT, see `encoder.Config`."""

    model_type: ClassVar[str] = "bert"
    DROPOUTS: ClassVar[tuple[str, ...]] = (*encoder.Config.DROPOUTS, "classifier_dropout")

    classifier_dropout: float | None = None
    """None: hidden_dropout_prob."""

    @classmethod
    def fixed(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Return what of a ``config.json`` is not implemented, with the values under which it changes nothing."""
        return super().fixed(config) | {"position_embedding_type": ("absolute", None)}


class Bert(nn.Module):
    """BERT with the head of a task (`ARCHITECTURES` lists them)."""

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
          input_ids: int (batch, length), below ``vocab_size``; one outside gives NaN.
          attention_mask: (batch, length), nonzero = a token, 0 = padding. None: all tokens.
          token_type_ids: int (batch, length), below ``type_vocab_size``. None: zeros.
          deterministic: no dropout. When false, pass ``rngs={"dropout": key}``.

        Returns:
          float32, as `heads.head` does for each task: logits, or the last hidden state.

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


Model = Bert

ARCHITECTURES = {
    "sequence-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "features": "BertModel",
}
"""Task -> Hugging Face's class."""

HEAD = task_heads.HEAD
"""Paths that a task brings with it; created where a checkpoint lacks them."""

PREFIX = "bert."
"""Of every name but those of the heads; files of a bare ``BertModel`` lack it."""

_LAYER = (
    ("attention/query", "attention.self.query"),
    ("attention/key", "attention.self.key"),
    ("attention/value", "attention.self.value"),
    ("attention/output", "attention.output.dense"),
    ("mlp/up", "intermediate.dense"),
    ("mlp/down", "output.dense"),
)
_NORM = (
    ("embeddings/norm", "bert.embeddings.LayerNorm"),
    ("encoder/layer_{i}/attention_norm", "bert.encoder.layer.{i}.attention.output.LayerNorm"),
    ("encoder/layer_{i}/mlp_norm", "bert.encoder.layer.{i}.output.LayerNorm"),
)


def dense(ours: str, theirs: str) -> tuple[tuple[str, str, Layout], ...]:
    """Return the rows of `HF_NAMES` for a kernel and its bias."""
    return (f"{ours}/kernel", f"{theirs}.weight", KERNEL), (f"{ours}/bias", f"{theirs}.bias", PLAIN)


BACKBONE: tuple[tuple[str, str, Layout], ...] = (
    ("embeddings/word/embedding", "bert.embeddings.word_embeddings.weight", PLAIN),
    ("embeddings/position/embedding", "bert.embeddings.position_embeddings.weight", PLAIN),
    ("embeddings/token_type/embedding", "bert.embeddings.token_type_embeddings.weight", PLAIN),
    *(
        row
        for ours, theirs in _LAYER
        for row in dense(f"encoder/layer_{{i}}/{ours}", f"bert.encoder.layer.{{i}}.{theirs}")
    ),
    *((f"{ours}/bias", f"{theirs}.bias", PLAIN) for ours, theirs in _NORM),
    *((f"{ours}/scale", f"{theirs}.weight", PLAIN) for ours, theirs in _NORM),
)
"""The rows of `HF_NAMES` without the heads."""

HF_NAMES = (
    *BACKBONE,
    *dense("pooler", "bert.pooler.dense"),
    *dense("classifier", "classifier"),
    *dense("token_classifier", "classifier"),
    *dense("span", "qa_outputs"),
)
"""(our path, Hugging Face's name, how the one stands in the other); ``{i}`` is the number of the layer in both."""

OLD_NAMES = ((r"(.*\.LayerNorm)\.gamma", r"\1.weight"), (r"(.*\.LayerNorm)\.beta", r"\1.bias"))
"""(regex, replacement) for names that checkpoints converted from TensorFlow have."""

IGNORED_NAMES = (r"(.*\.)?position_ids", r"cls\..*")
"""Names that hold nothing of the model: a constant 0, 1, 2 ..., and the heads of the pretraining."""

AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
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
)
"""(regex over whole paths, the logical name of each axis); None: an axis that nothing shares."""

_INNER = tuple(f"encoder/layer_{{i}}/attention/{name}" for name in ("query", "key", "value"))

CUTS: dict[str, dict[str, Any]] = {
    "heads": {
        "axes": (
            *((f"{path}/kernel", 1, "head_size") for path in _INNER),
            *((f"{path}/bias", 0, "head_size") for path in _INNER),
            ("encoder/layer_{i}/attention/output/kernel", 0, "head_size"),
        ),
        "scored": ("encoder/layer_{i}/attention/query/kernel", "encoder/layer_{i}/attention/value/kernel"),
    },
    "neurons": {
        "axes": (
            ("encoder/layer_{i}/mlp/up/kernel", 1, 1),
            ("encoder/layer_{i}/mlp/up/bias", 0, 1),
            ("encoder/layer_{i}/mlp/down/kernel", 0, 1),
        ),
        "scored": ("encoder/layer_{i}/mlp/up/kernel",),
    },
}
"""By kind of unit, for every layer ``{i}``. ``axes``: (path, axis, entries), what is cut together; the axis is the units one
after the other, each of so many entries (a number, or the field of the config that says it). ``scored``: the kernels whose
columns of a unit make its score. Paths that a model has not do not count."""
