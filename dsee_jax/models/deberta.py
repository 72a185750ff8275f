"""DeBERTa (arXiv 2006.03654), version 1, in plain Linen, numerically Hugging Face's.

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
from dsee_jax.models.bert import OLD_NAMES
from dsee_jax.models.encoder import Embeddings, Encoder

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

TERMS = ("c2p", "p2c")
"""Content to position, and position to content."""


@dataclasses.dataclass(frozen=True)
class Config(encoder.Config):
    """The fields of DeBERTa, see `encoder.Config`.

    Raises:
      InputError: as of `encoder.Config`, or attention terms that are not of `TERMS`.
    """

    model_type: ClassVar[str] = "deberta"
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
    """Distances beyond it count as it; below 1: max_position_embeddings."""
    pos_att_type: tuple[str, ...] | str | None = None
    """Of `TERMS`; as a text they stand between ``|``."""
    position_biased_input: bool = True
    """Add absolute positions to the input."""
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    cls_dropout: float | None = None
    """Before the classifier of whole texts; None: hidden_dropout_prob."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("type_vocab_size", 0), ("max_relative_positions", None)):
            value = getattr(self, name)
            if type(value) is not int or (least is not None and value < least):
                raise InputError(
                    f"{name!r} is {value!r}; expected a whole number" + ("" if least is None else " from 0")
                )
        listed = self.pos_att_type is None or isinstance(self.pos_att_type, str | tuple)
        if not listed or any(term not in TERMS for term in self.terms) or len(set(self.terms)) < len(self.terms):
            raise InputError(f"'pos_att_type' is {self.pos_att_type!r}; implemented: {', '.join(TERMS)}, each once")

    @classmethod
    def fixed(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Return what of a ``config.json`` is not implemented, with the values under which it changes nothing."""
        width = config.get("hidden_size")
        return super().fixed(config) | {
            "talking_head": (False, None),
            "embedding_size": (width,),
            "pooler_hidden_size": (width,),
            # Which of two heads a masked language model has.
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
        """The largest distance that is told from larger ones."""
        return self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input; None: no limit."""
        return self.max_position_embeddings if self.position_biased_input else None


class Attention(layers.Attention):
    """Disentangled attention (equation 4 of the paper); params query, key, value, output, position_key, position_query.

    The distance of a query at i from a key at j is i - j, clipped to what the embeddings have.
    """

    relative: tuple[str, ...] = ()
    """Which of `TERMS` are computed."""
    position_dropout: float = 0.0

    def setup(self) -> None:
        """Declare the projections of the embeddings of distances, beside those of every attention."""
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
          query: (batch, queries, heads, size), already divided.
          key: (batch, keys, heads, size).
          deterministic: no dropout.
          *context: the embeddings of the distances -s .. s - 1, (1, 2 s, width).
        """
        (distances,) = context
        found, span = super().scores(query, key, deterministic), distances.shape[1] // 2
        distances = self.drop(distances, deterministic)
        by_head = (2 * span, self.heads, self.head_size)
        difference = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])[None]
        places = jnp.clip(difference + span, 0, 2 * span - 1)[None, None]
        if "c2p" in self.relative:
            positions = self.position_key(distances).reshape(by_head)
            content = jnp.einsum("bqhd,phd->bhqp", query, positions, preferred_element_type=jnp.float32)
            found += jnp.take_along_axis(content, places, axis=-1)
        if "p2c" in self.relative:
            positions = self.position_query(distances).reshape(by_head)
            positions = positions / np.sqrt(self.terms * self.head_size).astype(positions.dtype)
            content = jnp.einsum("bkhd,phd->bhpk", key, positions, preferred_element_type=jnp.float32)
            found += jnp.take_along_axis(content, places, axis=-2)
        return found


def attention(config: Config, number: int) -> layers.Attention:
    """Return the attention of layer ``number``."""
    more: dict[str, Any] = {"unbiased": ("key",), "terms": 1 + len(config.terms)}
    if not config.relative_attention:
        return encoder.attention(config, number, **more)
    more |= {"relative": config.terms, "position_dropout": config.hidden_dropout_prob}
    return encoder.attention(config, number, Attention, **more)


class RelativeEncoder(nn.Module):
    """The layers, and the embeddings of distances that they share."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool, kept: int | None = None) -> jax.Array:
        """Return (batch, kept, width), arguments as of `Encoder`."""
        config = self.config
        encode = Encoder(config, attention, name="layers")
        nn.share_scope(self, encode)
        if not config.relative_attention:
            return encode(x, mask, deterministic, kept)
        most = config.distance
        table = nn.Embed(2 * most, config.hidden_size, embedding_init=encoder.init(config), name="distance")
        # Longer distances than the input's need no products; a length that is a symbol (jax.export) may have any.
        span = min(x.shape[1], most) if isinstance(x.shape[1], int) else most
        return encode(x, mask, deterministic, kept, table(jnp.arange(most - span, most + span)[None]))


class Deberta(nn.Module):
    """DeBERTa with the head of a task (`ARCHITECTURES` lists them)."""

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
        """Run the model, arguments and outputs as of `bert.Bert`; without token types ``token_type_ids`` are not read.

        Raises:
          InputError: the model has absolute positions and the batch is longer than ``max_position_embeddings``.
        """
        config = self.config
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = jnp.arange(input_ids.shape[1])[None] if config.position_biased_input else None
        embeddings = Embeddings(config, name="embeddings")
        x = embeddings(input_ids, positions, types if config.type_vocab_size else None, deterministic, mask)
        seen, kept = mask != 0, task_heads.read(self.task)
        # Padding sees nothing, as a query too.
        pairs = seen[:, None, :, None] & seen[:, None, None, :]
        x = RelativeEncoder(config, name="encoder")(x, pairs, deterministic, kept)

        def pool(first: jax.Array) -> jax.Array:
            first = layers.Dropout(config.pooler_dropout)(first, deterministic)
            return layers.ACTIVATIONS[config.pooler_hidden_act](
                task_heads.dense(config, config.hidden_size, "pooler")(first)
            )

        rate = config.cls_dropout if self.task == "sequence-classification" else None
        return task_heads.head(config, self.task, x, deterministic, pool=pool, rate=rate)


Model = Deberta

ARCHITECTURES = {
    "sequence-classification": "DebertaForSequenceClassification",
    "token-classification": "DebertaForTokenClassification",
    "question-answering": "DebertaForQuestionAnswering",
    "features": "DebertaModel",
}
"""Task -> Hugging Face's class."""

HEAD = task_heads.HEAD

PREFIX = "deberta."
"""Of every name but those of the heads; files of a bare ``DebertaModel`` lack it."""

_OURS, _THEIRS = "encoder/layer_{i}/attention", f"{PREFIX}encoder.layer.{{i}}.attention.self"
_INNER = tuple(f"{_OURS}/{name}" for name in ("query", "key", "value"))

HF_NAMES: tuple[tuple[str, str, Layout], ...] = (
    *(
        (ours, PREFIX + theirs.removeprefix(bert.PREFIX), layout)
        for ours, theirs, layout in bert.BACKBONE
        if ours.rpartition("/")[0] not in _INNER
    ),
    *(
        (f"{path}/kernel", f"{_THEIRS}.in_proj.weight", Layout(True, part, 3, "head_size"))
        for part, path in enumerate(_INNER)
    ),
    (f"{_OURS}/query/bias", f"{_THEIRS}.q_bias", PLAIN),
    (f"{_OURS}/value/bias", f"{_THEIRS}.v_bias", PLAIN),
    (f"{_OURS}/position_key/kernel", f"{_THEIRS}.pos_proj.weight", KERNEL),
    *bert.dense(f"{_OURS}/position_query", f"{_THEIRS}.pos_q_proj"),
    ("encoder/distance/embedding", f"{PREFIX}encoder.rel_embeddings.weight", PLAIN),
    *bert.dense("pooler", "pooler.dense"),
    *bert.dense("classifier", "classifier"),
    *bert.dense("token_classifier", "classifier"),
    *bert.dense("span", "qa_outputs"),
)
"""(our path, Hugging Face's name, how the one stands in the other); ``{i}`` is the number of the layer in both."""

IGNORED_NAMES = (r"(.*\.)?position_ids", r"(.*\.)?position_embeddings\..*", r"(cls|lm_predictions)\..*")
"""Names that hold nothing of the model: a constant, positions of the pretraining's decoder, the heads of the pretraining."""

AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"encoder/distance/embedding", (None, "embed")),
    (r".*/attention/position_(key|query)/kernel", ("embed", "heads")),
    (r".*/attention/position_query/bias", ("heads",)),
    *bert.AXES,
)
"""(regex over whole paths, the logical name of each axis); None: an axis that nothing shares."""

CUTS: dict[str, dict[str, Any]] = bert.CUTS | {
    "heads": bert.CUTS["heads"]
    | {
        "axes": (
            *bert.CUTS["heads"]["axes"],
            *((f"{_OURS}/{name}/kernel", 1, "head_size") for name in ("position_key", "position_query")),
            (f"{_OURS}/position_query/bias", 0, "head_size"),
        )
    }
}
"""By kind of unit, for every layer ``{i}``, as BERT's."""
