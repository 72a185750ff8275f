"""An architecture as one value, and the protocols of the configs and models that belong to it.

Generic code reads an `Architecture` and never names a model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeAlias

from dsee_jax.hf_layout import Layout
from dsee_jax.typing import Module

HfNames: TypeAlias = tuple[tuple[str, str, Layout], ...]
"""(path of a param, Hugging Face's name of its tensor, layout of the param in the tensor); ``{i}`` is the number of the layer
in both names."""

Axes: TypeAlias = tuple[tuple[str, tuple[str | None, ...]], ...]
"""(regex over complete paths, logical name of each axis); None: an axis that no other param shares. All axes of the hidden
dimension of the residual stream, and no others, are named `HIDDEN`: pruned dimensions are cut from all of them."""

HIDDEN = "embed"
"""The logical name of the axes of the hidden dimension."""


class ModelConfig(Protocol):
    """The fields and methods of a config that generic code uses; a config is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the kind of model."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the table of words."""
        ...

    @property
    def type_vocab_size(self) -> int:
        """Rows of the table of token types; 0: no such table."""
        ...

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input; None: no limit."""
        ...

    @property
    def hidden_size(self) -> int:
        """Entries of the hidden state of a token."""
        ...

    @property
    def head_size(self) -> int:
        """Entries of an attention head."""
        ...

    @property
    def initializer_range(self) -> float:
        """Standard deviation of new kernels."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """The id of padding; None: not given."""
        ...

    @property
    def num_labels(self) -> int:
        """Columns of a classifier; 1 for regression."""
        ...

    @property
    def dtype(self) -> str:
        """float32 or bfloat16, of the matrix products."""
        ...

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """The number of units of each kind (``heads``, ``neurons``) in every layer."""
        ...

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> Self:
        """Read a parsed ``config.json``; ``run`` gives num_labels and dtype."""
        ...

    def with_dropout(self, rate: float) -> Self:
        """Return this config with every dropout rate set to ``rate``, in [0, 1)."""
        ...

    def with_widths(self, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None) -> Self:
        """Return this config with these numbers of units in every layer; None: the numbers of the standard fields.

        Numbers that all layers share become standard fields where the ``model_type`` has these; the fields ``kept_*`` hold the
        others.
        """
        ...

    def with_hidden(self, size: int) -> Self:
        """Return this config with ``size`` entries of the hidden state, and heads of the size that they have.

        Pass the result on to `with_widths`, which finds the standard fields for it.
        """
        ...

    @property
    def own_width(self) -> bool:
        """Whether the standard fields cannot hold the size of the heads beside the hidden width."""
        ...

    def with_layers(self, kept: Sequence[bool]) -> Self:
        """Return this config with the layers of ``kept`` (layers,), True = kept, renumbered.

        Raises:
          InputError: a layer depends on its number, so that no renumbered layer computes the same.
        """
        ...


class Model(Module, Protocol):
    """A transformer with the head of a task: a Linen module that is hashable, as static arguments and caches need."""

    @property
    def config(self) -> ModelConfig:
        """The sizes and rates of the model."""
        ...

    @property
    def task(self) -> str:
        """A key of `Architecture.tasks`."""
        ...

    def clone(self, **updates: Any) -> Self:
        """Return a copy with some fields replaced."""
        ...

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ``{"params": ...}`` with new values."""
        ...


def scans(model: Model) -> bool:
    """Return whether a model runs its layers by ``jax.lax.scan``, on stacked params; encoders lack this option."""
    return getattr(model, "scan", False)


class UnitTemplate(NamedTuple):
    """The units of one kind in layer ``{i}``; `dsee_jax.models.cuts` fills in the layers."""

    axes: tuple[tuple[str, int, int | str], ...]
    """(path, axis, entries) of all arrays that are pruned together. The axis holds the units one after the other, each of
    ``entries`` (a number, or the name of the config field that holds the number). Paths that a model lacks are skipped."""
    scored: tuple[str, ...]
    """Kernels (in, out); the columns of a unit make its score."""
    numbers: str = ""
    """The config field with the numbers of the units that each layer keeps, ``((number, ...), ...)`` or None for all: of units
    that have entries in a param that all layers share. Empty: no such units."""


def standard_cuts(layer: str) -> dict[str, UnitTemplate]:
    """Return the units of a layer at the path ``layer`` with query, key, value, output, up and down kernels."""
    inner = [f"{layer}/attention/{name}" for name in ("query", "key", "value")]
    return {
        "heads": UnitTemplate(
            axes=(
                *((f"{path}/kernel", 1, "head_size") for path in inner),
                *((f"{path}/bias", 0, "head_size") for path in inner),
                (f"{layer}/attention/output/kernel", 0, "head_size"),
            ),
            scored=(f"{layer}/attention/query/kernel", f"{layer}/attention/value/kernel"),
        ),
        "neurons": UnitTemplate(
            axes=((f"{layer}/mlp/up/kernel", 1, 1), (f"{layer}/mlp/up/bias", 0, 1), (f"{layer}/mlp/down/kernel", 0, 1)),
            scored=(f"{layer}/mlp/up/kernel",),
        ),
    }


class GgufNames(NamedTuple):
    """The names and the layout of one kind of model in GGUF files; ``{i}`` is the number of the layer."""

    fields: Mapping[str, str]
    """Key of the metadata, after ``ARCHITECTURE.`` -> field of ``config.json``."""
    modules: Mapping[str, str]
    """Module -> Hugging Face's name of the module. Their tensors end in ``.weight`` or ``.bias`` in both."""
    interleaved: tuple[str, ...] = ()
    """Modules whose outputs alternate between the two halves of a head."""


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """All that generic code knows of an architecture; compared and hashed by identity."""

    config: type[ModelConfig]
    """The class of its configs."""
    model: Callable[..., Model]
    """``model(config, task)`` returns the Linen module."""
    model_types: Mapping[str, str]
    """Hugging Face's ``model_type`` -> the start of the names of Hugging Face's classes."""
    tasks: Mapping[str, str]
    """Task -> the end of the name of Hugging Face's class."""
    head: tuple[str, ...]
    """Regexes over the paths of the task heads. A head that a checkpoint lacks is created."""
    prefix: str
    """The prefix of all Hugging Face names outside the heads; checkpoints of a bare model lack it."""
    hf_names: HfNames
    """The tensor of every param. Several params may share one tensor."""
    axes: Axes
    """The logical axes of every param, for sharding; the first regex that matches counts."""
    cuts: Mapping[str, UnitTemplate]
    """The units that can be pruned, by kind: ``heads`` and ``neurons``."""
    ignored_names: tuple[str, ...] = ()
    """Regexes over names of tensors that are no param of the model."""
    tied: tuple[str, str] | None = None
    """The paths of the output matrix over the vocabulary and of the embedding to which a config may tie it."""
    gguf: Mapping[str, GgufNames] = dataclasses.field(default_factory=dict)
    """``model_type`` -> names in GGUF files, whose ``general.architecture`` it is too."""
