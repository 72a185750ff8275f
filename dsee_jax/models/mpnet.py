"""MPNet (arXiv 2004.09297) in plain Linen, numerically equal to Hugging Face's.

Beside absolute positions, attention scores have a bias by head and distance of query and key (arXiv 1910.10683, section 2.1).
All layers share its table: one row for each bucket of distances, one column for each head of the pretrained model. A layer
that lost heads reads the columns of the heads that it keeps, so the config holds their numbers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.errors import InputError, shorten
from dsee_jax.hf_layout import PLAIN
from dsee_jax.models import bert, encoder, hf_config, layers, task_heads
from dsee_jax.models.encoder import Embeddings, Encoder
from dsee_jax.models.roberta import positions

PADDING = 1
"""The id that takes no position and the position of padding, whatever ``pad_token_id`` is, as in Hugging Face's code."""

BUCKETS = 32
"""The buckets of distances in Hugging Face's code, half of them for keys after the query; a table may have more rows."""


@dataclasses.dataclass(frozen=True)
class Config(encoder.Config):
    """The fields of MPNet, see `encoder.Config`; positions are counted from 2.

    Raises:
      InputError: as of `encoder.Config`, fewer than `BUCKETS` rows of the bias, positions that leave no token, or
        ``kept_head_numbers`` that are not ``kept_heads`` increasing numbers for each layer.
    """

    model_type = "mpnet"
    SIZES: ClassVar[tuple[str, ...]] = (
        *(name for name in encoder.Config.SIZES if name != "type_vocab_size"),
        "relative_attention_num_buckets",
    )
    LAYERED: ClassVar[tuple[str, ...]] = (*encoder.Config.LAYERED, "kept_head_numbers")

    type_vocab_size: int = 0
    """MPNet has no token types."""
    pad_token_id: int | None = 1
    relative_attention_num_buckets: int = BUCKETS
    """Rows of the table of the bias; `BUCKETS` of them are read."""
    kept_head_numbers: tuple[tuple[int, ...], ...] | None = None
    """The numbers, from 0, of the heads that each layer of a structurally pruned model keeps. None: all heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relative_attention_num_buckets < BUCKETS:
            raise InputError(
                f"'relative_attention_num_buckets' is {self.relative_attention_num_buckets}; expected {BUCKETS} or more: "
                f"the distances have {BUCKETS} buckets"
            )
        if (self.longest or 0) < 1:
            raise InputError(
                f"'max_position_embeddings' is {self.max_position_embeddings}; expected 3 or more: positions begin at 2"
            )
        heads, numbers = self.widths["heads"], self.kept_head_numbers
        all_heads = (self.num_attention_heads,) * self.num_hidden_layers
        fits = heads == all_heads if numbers is None else _numbered(numbers, heads, self.num_attention_heads)
        if not fits:
            raise InputError(
                f"'kept_head_numbers' is {shorten(repr(numbers))}; expected for each layer the increasing numbers, from 0 to "
                f"{self.num_attention_heads - 1}, of its heads, {shorten(repr(heads))} of them"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> Self:
        """Read a parsed ``config.json``; ``run`` gives num_labels and dtype. Raises `InputError` as `hf_config.read` does."""
        # Hugging Face's model has no token types, whatever the field says.
        return super().from_hf({**config, "type_vocab_size": 0}, **run)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input."""
        return self.max_position_embeddings - PADDING - 1

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """The columns of the bias that each layer reads, one for each head."""
        return self.kept_head_numbers or (tuple(range(self.num_attention_heads)),) * self.num_hidden_layers

    def with_widths(self, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None) -> Self:
        """Return this config with these numbers of units in every layer, see `encoder.Config.with_widths`.

        The kept heads are those of this config where they are as many, and else the first ones;
        `dsee_jax.prune.compaction.resized` names others.
        """
        numbers = self.kept_head_numbers
        if heads is not None and (numbers is None or [*map(len, numbers)] != [*heads]):
            numbers = tuple(tuple(range(count)) for count in heads)
        bare = dataclasses.replace(self, kept_heads=None, kept_head_numbers=None)
        counted = super(Config, bare).with_widths(None, neurons)
        kept = hf_config.kept_widths(heads, self.num_attention_heads)
        return dataclasses.replace(counted, kept_heads=kept, kept_head_numbers=numbers if kept else None)


def _numbered(numbers: Any, counts: Sequence[int], most: int) -> bool:
    """Return whether ``numbers`` are increasing numbers below ``most`` for each layer, as many as ``counts`` says."""
    layers_match = isinstance(numbers, tuple) and len(numbers) == len(counts)
    return layers_match and all(
        isinstance(names, tuple) and len(names) == count and [*names] == [n for n in range(most) if n in names]
        for names, count in zip(numbers, counts, strict=True)
    )


class Attention(layers.Attention):
    """Attention with a bias by head and distance; params query, key, value, output."""

    columns: tuple[int, ...] = ()
    """The heads of the bias that the heads of this layer read."""

    def scores(self, query: jax.Array, key: jax.Array, deterministic: bool, *context: Any) -> jax.Array:
        """Return float32 (batch, heads, queries, keys).

        Args:
          query: (batch, heads, queries, size), already scaled.
          key: (batch, heads, keys, size).
          deterministic: no dropout.
          *context: the bias of all heads of the pretrained model, (1, heads, length, length).
        """
        (bias,) = context
        bias = bias[:, :, : query.shape[2]]
        if len(self.columns) < bias.shape[1]:
            bias = bias[:, np.array(self.columns)]
        return super().scores(query, key, deterministic) + bias


def attention(config: Config, number: int) -> layers.Attention:
    """Return the attention of layer ``number``."""
    return encoder.attention(config, number, Attention, columns=config.columns[number])


def buckets(length: int) -> jax.Array:
    """Return the bucket of the distance of every query from every key, int32 (length, length), from 0 to 31.

    Distances below 8 have a bucket each; from there buckets are eight to a factor of 16, and 128 and more share the last.
    Keys after the query have the buckets from 16 on. ``length`` may be symbolic (jax.export).
    """
    each = BUCKETS // 4
    # The first distance of every bucket but the first, in whole numbers: no rounding of logarithms.
    first = np.array([*range(1, each), *(math.isqrt(each * each * 2**power - 1) + 1 for power in range(each))])
    difference = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    bucket = jnp.searchsorted(first, jnp.abs(difference), side="right", method="compare_all")
    return bucket + jnp.where(difference < 0, BUCKETS // 2, 0)


class RelativeEncoder(nn.Module):
    """The layers, and the bias that all layers share."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool, first: int | None = None) -> jax.Array:
        """Return (batch, first, width), arguments as of `Encoder`."""
        config = self.config
        encode = Encoder(config, attention, name="layers")
        nn.share_scope(self, encode)
        rows, heads = config.relative_attention_num_buckets, config.num_attention_heads
        table = nn.Embed(rows, heads, embedding_init=layers.init(config), name="relative")
        bias = jnp.transpose(table(buckets(x.shape[1])), (2, 0, 1))[None]
        return encode(x, mask, deterministic, first, bias)


class Mpnet(nn.Module):
    """MPNet with the head of a task (`task_heads.TASKS` lists them)."""

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
        """Run the model, arguments and outputs as of `bert.Bert`; ``token_type_ids`` are ignored.

        Positions skip the id `PADDING`; the mask does not count.

        Raises:
          InputError: the batch is longer than ``max_position_embeddings - 2``.
        """
        del token_type_ids
        config = self.config
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        x = Embeddings(config, name="embeddings")(input_ids, positions(input_ids, PADDING), None, deterministic)
        encode = RelativeEncoder(config, name="encoder")
        x = encode(x, (mask != 0)[:, None, None, :], deterministic, task_heads.read(self.task))

        def pool(first: jax.Array) -> jax.Array:
            first = layers.Dropout(config.hidden_dropout_prob)(first, deterministic)
            return jnp.tanh(task_heads.dense(config, config.hidden_size, "pooler")(first))

        return task_heads.head(config, self.task, x, deterministic, pool=pool, rate=None)


_LAYER, _STORED = "encoder/layer_{i}", "mpnet.encoder.layer.{i}"

ARCHITECTURE = dataclasses.replace(
    bert.ARCHITECTURE,
    config=Config,
    model=Mpnet,
    model_types={"mpnet": "MPNet"},
    prefix="mpnet.",
    hf_names=(
        *(
            (path, name.replace("bert.", "mpnet.", 1), layout)
            for path, name, layout in bert.BACKBONE
            if "/attention" not in path and path != "embeddings/token_type/embedding"
        ),
        *(
            row
            for name in ("query", "key", "value", "output")
            for row in bert.dense(f"{_LAYER}/attention/{name}", f"{_STORED}.attention.attn.{name[0]}")
        ),
        (f"{_LAYER}/attention_norm/scale", f"{_STORED}.attention.LayerNorm.weight", PLAIN),
        (f"{_LAYER}/attention_norm/bias", f"{_STORED}.attention.LayerNorm.bias", PLAIN),
        ("encoder/relative/embedding", "mpnet.encoder.relative_attention_bias.weight", PLAIN),
        *bert.dense("pooler", "classifier.dense"),
        *bert.dense("classifier", "classifier.out_proj"),
        *bert.dense("token_classifier", "classifier"),
        *bert.dense("span", "qa_outputs"),
    ),
    # Every device holds the whole bias: its columns are heads, not entries of heads.
    axes=((r"encoder/relative/embedding", (None, None)), *bert.ARCHITECTURE.axes),
    cuts={
        **bert.ARCHITECTURE.cuts,
        "heads": bert.ARCHITECTURE.cuts["heads"]._replace(numbers="kept_head_numbers"),
    },
    # The constant 0, 1, 2 ..., the pretraining head, and a pooler that no head reads.
    ignored_names=(r"(.*\.)?position_ids", r"lm_head\..*", r"(mpnet\.)?pooler\..*"),
)
