"""The fields of a Hugging Face ``config.json``: each field is used, checked, or known to change nothing.

An unknown field is an error: a model that ignores the field might silently compute other numbers.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from dsee_jax.errors import InputError, did_you_mean

RUN = ("num_labels", "dtype")
"""Fields of our configs that the run sets. Hugging Face's ``dtype`` is the storage type, which the tensors themselves tell."""

FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "per_layer_config": ({}, None),
    "quantization_config": (None,),
    "auto_map": ({}, None),
}
"""Fields that would change the result of any model, with the values that do not."""

IGNORED = re.compile(
    # origin
    r"_.*|model_type|architectures|name|language|license|tags|transformers_version|finetuning_task|task_specific_params"
    r"|sentence_transformers|tokenizer_class|prefix|model_max_length|adapter.*"
    # labels and losses
    r"|num_labels|id2label|label2id|problem_type"
    # running and storing by Hugging Face
    r"|torch_dtype|dtype|torchscript|use_bfloat16|tf_legacy_loss|return_dict|use_return_dict|output_.*|use_cache"
    r"|chunk_size_feed_forward|gradient_checkpointing|tie_word_embeddings|tie_encoder_decoder|tie_last_hidden_states|padding_idx"
    # left from TensorFlow, or of heads that this library lacks
    r"|directionality|pooler_.*|n_ctx|summary_.*"
    # text generation
    r"|(bos|eos|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_id|max_length|min_length|do_sample|early_stopping"
    r"|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p|typical_p|repetition_penalty|length_penalty"
    r"|(encoder_)?no_repeat_ngram_size|bad_words_ids|num_return_sequences|suppress_tokens|begin_suppress_tokens"
    r"|remove_invalid_values|exponential_decay_length_penalty|cross_attention_hidden_size"
)
"""Fields that change no logit of a model that is read from a folder."""

C = TypeVar("C")


def read(config_class: type[C], fields: Mapping[str, Any], *, fixed: Mapping[str, tuple[Any, ...]], **run: Any) -> C:
    """Return ``config_class`` (a dataclass with Hugging Face's names) filled from a ``config.json``.

    Args:
      config_class: every field without a default must be in ``fields``.
      fields: the parsed file.
      fixed: for fields that are not implemented, the values that change nothing; added to `FIXED`.
      **run: `RUN` fields.

    Raises:
      InputError: a field is missing, unknown, or has a value that is not implemented.
    """
    fixed = FIXED | dict(fixed)
    names = {field.name: field for field in dataclasses.fields(config_class) if field.name not in RUN}  # pyright: ignore
    for name, field in names.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise InputError(
                f"{name!r} is missing; it has no default{did_you_mean(name, fields.keys() - names.keys())}"
            )
    for name, value in fields.items():
        if name in fixed and value not in fixed[name]:
            raise InputError(f"{name!r} is {value!r}, which is not implemented; only {fixed[name][0]!r} is")
        if name not in names and name not in fixed and not IGNORED.fullmatch(name):
            near = did_you_mean(name, names.keys() - fields.keys())
            raise InputError(
                f"unknown field {name!r}{near}; if the model does not depend on it, take it out of the file"
            )
    values = {name: fields[name] for name in names if name in fields}
    # A config is a static argument of compiled functions, so it must be hashable.
    return config_class(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}, **run)


def names(config: Any) -> frozenset[str]:
    """Return the names of the fields that `read` takes."""
    return frozenset(field.name for field in dataclasses.fields(config)) - {*RUN}


def write(config: Any) -> dict[str, Any]:
    """Return the fields that `read` takes, for a ``config.json``, without those that are None; nested groups likewise.

    The config's ``explicit`` names the fields whose None is written: without it, they would be read as another value.
    """
    values = {name: getattr(config, name) for name in sorted(names(config))}
    values = {name: write(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    explicit = getattr(config, "explicit", ())
    return {name: value for name, value in values.items() if value is not None or name in explicit}


def check(config: Any, *, sizes: tuple[str, ...], rates: tuple[str, ...], flags: tuple[str, ...] = ()) -> None:
    """Raise `InputError` unless ``sizes`` are whole numbers from 1, ``rates`` numbers in [0, 1) and ``flags`` true or false.

    A flag may also be None.
    """
    for name in sizes:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise InputError(f"{name!r} is {value!r}; expected a whole number from 1")
    for name in rates:
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InputError(f"{name!r} is {value!r}; expected a number in [0, 1)")
    for name in flags:
        value = getattr(config, name)
        if value is not None and type(value) is not bool:
            raise InputError(f"{name!r} is {value!r}; expected true or false")


def check_widths(config: Any, name: str, layers: int, most: int) -> None:
    """Raise `InputError` unless the field ``name`` is None or ``layers`` whole numbers in 0 .. ``most``."""
    value = getattr(config, name)
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != layers:
        raise InputError(f"{name!r} is {value!r}; expected one number for each of the {layers} layers")
    for width in value:
        if type(width) is not int or not 0 <= width <= most:
            raise InputError(f"{name!r} holds {width!r}; expected whole numbers from 0 to {most}")


def kept_widths(widths: Sequence[int] | None, full: int) -> tuple[int, ...] | None:
    """Return the ``kept_*`` field for ``widths``, units per layer: None if every layer has all ``full`` units."""
    return None if widths is None or set(widths) == {full} else tuple(widths)
