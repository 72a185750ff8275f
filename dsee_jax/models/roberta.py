"""RoBERTa (arXiv 1907.11692) in plain Linen, numerically equal to Hugging Face's: BERT with other positions and heads."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError
from dsee_jax.models import bert, task_heads
from dsee_jax.models.encoder import Embeddings, Encoder
from dsee_jax.models.layers import Dropout


@dataclasses.dataclass(frozen=True)
class Config(bert.Config):
    """The fields of RoBERTa, see `encoder.Config`; positions are counted from ``pad_token_id + 1``.

    Raises:
      InputError: as of `encoder.Config`, or a ``pad_token_id`` that leaves no position.
    """

    model_type = "roberta"

    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.max_position_embeddings - 2
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id <= most:
            raise InputError(
                f"'pad_token_id' is {self.pad_token_id!r}; expected a whole number from 0 to {most}, since positions are "
                "counted from pad_token_id + 1"
            )

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input."""
        return self.max_position_embeddings - (self.pad_token_id or 0) - 1


class Roberta(nn.Module):
    """RoBERTa with the head of a task (`task_heads.TASKS` lists them)."""

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
        """Run the model, arguments and outputs as of `bert.Bert`.

        Positions skip the padding, which is ``pad_token_id`` in ``input_ids``; the mask does not count.

        Raises:
          InputError: the batch is longer than ``max_position_embeddings - pad_token_id - 1``.
        """
        config = self.config
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = Embeddings(config, name="embeddings")(
            input_ids, positions(input_ids, config.pad_token_id), types, deterministic
        )
        x = Encoder(config, name="encoder")(x, (mask != 0)[:, None, None, :], deterministic, task_heads.read(self.task))

        def pool(first: jax.Array) -> jax.Array:
            rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
            first = Dropout(rate)(first, deterministic)
            return jnp.tanh(task_heads.dense(config, config.hidden_size, "pooler")(first))

        return task_heads.head(config, self.task, x, deterministic, pool=pool, rate=config.classifier_dropout)


def positions(input_ids: jax.Array, padding: int | None) -> jax.Array:
    """Return int32 (batch, length): ``padding`` at that id; padding + 1, + 2 ... at the others, across any padding."""
    real = (input_ids != padding).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + (padding or 0)


ARCHITECTURE = dataclasses.replace(
    bert.ARCHITECTURE,
    config=Config,
    model=Roberta,
    model_types={"roberta": "Roberta"},
    prefix="roberta.",
    hf_names=(
        *((path, name.replace("bert.", "roberta.", 1), layout) for path, name, layout in bert.BACKBONE),
        *bert.dense("pooler", "classifier.dense"),
        *bert.dense("classifier", "classifier.out_proj"),
        *bert.dense("token_classifier", "classifier"),
        *bert.dense("span", "qa_outputs"),
    ),
    # The constant 0, 1, 2 ..., the pretraining head, and a pooler that no head reads.
    ignored_names=(r"(.*\.)?position_ids", r"lm_head\..*", r"(roberta\.)?pooler\..*"),
)
