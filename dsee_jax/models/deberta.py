"""DeBERTa (arXiv 2006.03654), version 1, in plain Linen, numerically equal to Hugging Face's.

Attention is disentangled (section 3.1): beside content to content, scores have terms between content and the distance of two
positions, whose embeddings all layers share.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.errors import InputError
from dsee_jax.hf_layout import KERNEL, PLAIN, Layout
from dsee_jax.models import bert, encoder, layers, task_heads
from dsee_jax.models.architecture import UnitTemplate
from dsee_jax.models.encoder import Embeddings, Encoder

TERMS = ("c2p", "p2c")
"""Content to position, and position to content."""


_MOST = 2**24
"""The largest number of token types and of distances."""


@dataclasses.dataclass(frozen=True)
class Config(encoder.Config):
    """The fields of DeBERTa, see `encoder.Config`.

    Raises:
      InputError: as of `encoder.Config`, or unknown attention terms.
    """

    model_type = "deberta"
    SIZES: ClassVar[tuple[str, ...]] = tuple(name for name in encoder.Config.SIZES if name != "type_vocab_size")
    DROPOUTS: ClassVar[tuple[str, ...]] = (*encoder.Config.DROPOUTS, "pooler_dropout", "cls_dropout")
    OPTIONS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **encoder.Config.OPTIONS,
        "pooler_hidden_act": encoder.Config.OPTIONS["hidden_act"],
        "relative_attention": (True, False),
        "position_biased_input": (True, False),
    }

    type_vocab_size: int = 0
    """0: no token types."""
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    max_relative_positions: int = -1
    """Larger distances count as this one; below 1: max_position_embeddings."""
    pos_att_type: tuple[str, ...] | str | None = None
    """Some of `TERMS`; in a text they are separated by ``|``."""
    position_biased_input: bool = True
    """Add absolute positions to the input."""
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    cls_dropout: float | None = None
    """Before the classifier of sequences; None: hidden_dropout_prob."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("type_vocab_size", 0), ("max_relative_positions", -1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= _MOST:
                raise InputError(f"{name!r} is {value!r:.80}; expected a whole number from {least} to {_MOST}")
        readable = self.pos_att_type is None or isinstance(self.pos_att_type, str | tuple)
        if not readable or any(term not in TERMS for term in self.terms) or len(set(self.terms)) < len(self.terms):
            raise InputError(f"'pos_att_type' is {self.pos_att_type!r}; implemented: {', '.join(TERMS)}, each once")

    @classmethod
    def fixed(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Return the fields of a ``config.json`` that are not implemented, with the values that change nothing."""
        width = config.get("hidden_size")
        return super().fixed(config) | {
            "talking_head": (False, None),
            "pooler_hidden_size": (width,),
            # Selects one of two heads of a masked language model.
            "legacy": (True, False),
        }

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of attention beside content to content."""
        if isinstance(self.pos_att_type, str):
            return tuple(term.strip() for term in self.pos_att_type.lower().split("|"))
        return self.pos_att_type or ()

    @property
    def distance(self) -> int:
        """The largest distance with an embedding of its own; larger distances share the embedding."""
        return self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input; None: no limit."""
        return self.max_position_embeddings if self.position_biased_input else None


class Attention(layers.Attention):
    """Disentangled attention (equation 4 of the paper); params query, key, value, output, position_key, position_query.

    The distance of a query at i from a key at j is i - j, clipped to the range of the embeddings.
    """

    relative: tuple[str, ...] = ()
    """The computed terms, some of `TERMS`."""
    position_dropout: float = 0.0

    def setup(self) -> None:
        """Declare the projections of the distance embeddings, in addition to the usual ones."""
        super().setup()
        inner = self.heads * self.head_size
        if not inner:
            return
        project = functools.partial(nn.Dense, inner, dtype=self.dtype, kernel_init=self.kernel_init)
        if "c2p" in self.relative:
            self.position_key = project(use_bias=False)
        if "p2c" in self.relative:
            self.position_query = project()
        self.drop = layers.Dropout(self.position_dropout)

    def scores(self, query: jax.Array, key: jax.Array, deterministic: bool, *context: Any) -> jax.Array:
        """Return float32 (batch, heads, queries, keys).

        Args:
          query: (batch, heads, queries, size), already scaled.
          key: (batch, heads, keys, size).
          deterministic: no dropout.
          *context: the embeddings of the distances -s .. s - 1, (1, 2 s, width).
        """
        (distances,) = context
        scores, span = super().scores(query, key, deterministic), distances.shape[1] // 2
        distances = self.drop(distances, deterministic)
        by_head = (2 * span, self.heads, self.head_size)
        difference = jnp.arange(query.shape[2])[:, None] - jnp.arange(key.shape[2])[None]
        places = jnp.clip(difference + span, 0, 2 * span - 1)[None, None]
        if "c2p" in self.relative:
            positions = self.position_key(distances).reshape(by_head)
            content = jnp.einsum("bhqd,phd->bhqp", query, positions, preferred_element_type=jnp.float32)
            scores += jnp.take_along_axis(content, places, axis=-1)
        if "p2c" in self.relative:
            positions = self.position_query(distances).reshape(by_head)
            positions = positions / np.sqrt(self.terms * self.head_size).astype(positions.dtype)
            content = jnp.einsum("bhkd,phd->bhpk", key, positions, preferred_element_type=jnp.float32)
            scores += jnp.take_along_axis(content, places, axis=-2)
        return scores


def attention(config: Config, number: int) -> layers.Attention:
    """Return the attention of layer ``number``."""
    more: dict[str, Any] = {"unbiased": ("key",), "terms": 1 + len(config.terms)}
    if not config.relative_attention:
        return encoder.attention(config, number, **more)
    more |= {"relative": config.terms, "position_dropout": config.hidden_dropout_prob}
    return encoder.attention(config, number, Attention, **more)


class RelativeEncoder(nn.Module):
    """The layers, and the distance embeddings that all layers share."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool, first: int | None = None) -> jax.Array:
        """Return (batch, first, width), arguments as of `Encoder`."""
        config = self.config
        encode = Encoder(config, attention, name="layers")
        nn.share_scope(self, encode)
        if not config.relative_attention:
            return encode(x, mask, deterministic, first)
        most = config.distance
        table = nn.Embed(2 * most, config.hidden_size, embedding_init=layers.init(config), name="distance")
        # Distances beyond the input length need no products; a symbolic length (jax.export) may have any distance.
        span = min(x.shape[1], most) if isinstance(x.shape[1], int) else most
        return encode(x, mask, deterministic, first, table(jnp.arange(most - span, most + span)[None]))


class Deberta(nn.Module):
    """DeBERTa with the head of a task (`task_heads.TASKS` lists them)."""

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
        """Run the model, arguments and outputs as of `bert.Bert`; a model without token types ignores ``token_type_ids``.

        Raises:
          InputError: the model has absolute positions and the batch is longer than ``max_position_embeddings``.
        """
        config = self.config
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = jnp.arange(input_ids.shape[1])[None] if config.position_biased_input else None
        embeddings = Embeddings(config, name="embeddings")
        x = embeddings(input_ids, positions, types if config.type_vocab_size else None, deterministic, mask)
        seen, first = mask != 0, task_heads.read(self.task)
        # Padding sees nothing, also as a query.
        pairs = seen[:, None, :, None] & seen[:, None, None, :]
        x = RelativeEncoder(config, name="encoder")(x, pairs, deterministic, first)

        def pool(first: jax.Array) -> jax.Array:
            first = layers.Dropout(config.pooler_dropout)(first, deterministic)
            return layers.ACTIVATIONS[config.pooler_hidden_act](
                task_heads.dense(config, config.hidden_size, "pooler")(first)
            )

        rate = config.cls_dropout if self.task == "sequence-classification" else None
        return task_heads.head(config, self.task, x, deterministic, pool=pool, rate=rate)


_ATTENTION, _STORED = "encoder/layer_{i}/attention", "deberta.encoder.layer.{i}.attention.self"
_INNER = tuple(f"{_ATTENTION}/{name}" for name in ("query", "key", "value"))

ARCHITECTURE = dataclasses.replace(
    bert.ARCHITECTURE,
    config=Config,
    model=Deberta,
    model_types={"deberta": "Deberta"},
    prefix="deberta.",
    hf_names=(
        *(
            (path, name.replace("bert.", "deberta.", 1), layout)
            for path, name, layout in bert.BACKBONE
            if path.rpartition("/")[0] not in _INNER
        ),
        *(
            (f"{path}/kernel", f"{_STORED}.in_proj.weight", Layout(True, part, 3, "head_size"))
            for part, path in enumerate(_INNER)
        ),
        (f"{_ATTENTION}/query/bias", f"{_STORED}.q_bias", PLAIN),
        (f"{_ATTENTION}/value/bias", f"{_STORED}.v_bias", PLAIN),
        (f"{_ATTENTION}/position_key/kernel", f"{_STORED}.pos_proj.weight", KERNEL),
        *bert.dense(f"{_ATTENTION}/position_query", f"{_STORED}.pos_q_proj"),
        ("encoder/distance/embedding", "deberta.encoder.rel_embeddings.weight", PLAIN),
        *bert.dense("pooler", "pooler.dense"),
        *bert.dense("classifier", "classifier"),
        *bert.dense("token_classifier", "classifier"),
        *bert.dense("span", "qa_outputs"),
    ),
    axes=(
        (r"encoder/distance/embedding", (None, "embed")),
        (r".*/attention/position_(key|query)/kernel", ("embed", "heads")),
        (r".*/attention/position_query/bias", ("heads",)),
        *bert.ARCHITECTURE.axes,
    ),
    cuts={
        **bert.ARCHITECTURE.cuts,
        "heads": UnitTemplate(
            axes=(
                *bert.ARCHITECTURE.cuts["heads"].axes,
                *((f"{_ATTENTION}/{name}/kernel", 1, "head_size") for name in ("position_key", "position_query")),
                (f"{_ATTENTION}/position_query/bias", 0, "head_size"),
            ),
            scored=bert.ARCHITECTURE.cuts["heads"].scored,
        ),
    },
    # The constant 0, 1, 2 ..., the positions of the pretraining decoder, and the pretraining heads.
    ignored_names=(r"(.*\.)?position_ids", r"(.*\.)?position_embeddings\..*", r"(cls|lm_predictions)\..*"),
)
