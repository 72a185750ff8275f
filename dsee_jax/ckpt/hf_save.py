"""Write a model as a Hugging Face folder: ``config.json``, safetensors shards, tokenizer files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsee_jax import models
from dsee_jax.ckpt import companions, formats, kept_units, tensors
from dsee_jax.ckpt.folders import CARD, MODEL_CONFIG, MODEL_FILES
from dsee_jax.ckpt.hf_names import hf_tensors
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.errors import InputError
from dsee_jax.models import hf_config
from dsee_jax.models.architecture import Model
from dsee_jax.runtime import files
from dsee_jax.typing import Masks, Params


def save_pretrained(
    path: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    source: str | Path | None = None,
    labels: Sequence[str] = (),
    problem_type: str = "",
    kept: Masks | None = None,
    card: str = "",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a folder that `load_pretrained` and Hugging Face ``transformers`` open with equal results.

    A structurally pruned model whose layers have equal numbers of heads and of neurons is such a folder too, if its
    ``model_type`` has fields for them. Any other is a compact checkpoint, see `dsee_jax.models.hf_config.kept_kinds`: only
    this library opens it. For other tools, pass the model through `dsee_jax.prune.expand` first. ``path`` is
    complete or absent (`dsee_jax.runtime.files`).

    Args:
      path: the new folder; missing parents are created.
      model: as from `load_pretrained`.
      params: all params of the model, with masks and updates folded in.
      source: the original folder of the model, see `resolve`. The files of `companions` are copied, and the config.json fields
        that this library does not use are kept.
      labels: names of the classes, in the order of the logits; empty: the names of the source, or LABEL_0 ...
      problem_type: Hugging Face's name of the loss of the tuning, such as single_label_classification. ``transformers``
        computes probabilities by it. Empty: the source's.
      kept: for a structurally pruned model, all units before any pruning, True = kept; written beside the weights, and their
        numbers in config.json.
      card: the text of the model card; empty: no card is written.
      max_shard_size: bytes, or a text such as "5GB"; larger weights are split over several files.
      overwrite: replace a folder at ``path`` that holds no other files than those of a model.

    Raises:
      InputError: ``path`` exists and is not an empty folder (without ``overwrite``) or holds other files, ``params`` do not
        belong to the model, or the number of ``labels`` is not the number of classes.
    """
    origin = None if source is None else resolve(source)
    arrays, config = hf_tensors(model, params), _config(model, origin, labels, problem_type, kept or {})
    kinds = {str(array.dtype) for array in arrays.values()}
    config["dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    copied = [] if origin is None else [*companions.tokenizer_files(origin), *companions.others(origin)]
    names = (*MODEL_FILES, *companions.PATTERNS, *copied) if overwrite else ()
    with files.folder(path, replaces=names) as staging:
        # Without an index, some loaders (vLLM) read every safetensors file of a folder as weights, KEPT too.
        tensors.write(staging, arrays, max_shard_size=max_shard_size, indexed=bool(kept))
        (staging / MODEL_CONFIG).write_text(files.dumps(config, indent=2, sort_keys=True) + "\n")
        kept_units.write(staging, kept)
        if card:
            (staging / CARD).write_text(card, encoding="utf-8")
        if origin is not None:
            companions.copy(origin, staging, copied)


def _config(model: Model, origin: Path | None, labels: Sequence[str], problem_type: str, kept: Masks) -> dict[str, Any]:
    config = formats.model_config(origin) if origin else {}
    for name in ("_name_or_path", "torch_dtype", "transformers_version", hf_config.PER_LAYER):
        config.pop(name, None)
    own = {f"kept_{kind}": widths for kind, widths in model.config.widths.items() if kind in kept} | hf_config.write(
        model.config
    )
    if layers := hf_config.per_layer(model.config):
        own[hf_config.PER_LAYER] = layers
    config = {name: value for name, value in config.items() if name not in hf_config.names(model.config)} | own
    config |= {"model_type": model.config.model_type}
    # Fields of the source that repeat a size follow it.
    fixed = getattr(type(model.config), "fixed", lambda config: {})(config)
    config |= {name: values[0] for name, values in fixed.items() if name in config and config[name] not in values}
    config["architectures"] = [models.class_name(model)]
    if model.task == "sequence-classification" and model.config.pad_token_id is None:
        # Hugging Face's decoders classify at the last token that is not padding; without a padding id they take one text only.
        end = config.get("eos_token_id")
        config["pad_token_id"] = next(iter(end), 0) if isinstance(end, list) else end or 0
    count = model.config.num_labels
    if labels and len(labels) != count:
        raise InputError(f"labels has {len(labels)} names; the model has num_labels = {count}: give one name per label")
    if model.task not in ("features", "causal-lm") and (labels or len(config.get("id2label") or ()) != count):
        names = list(labels) or [f"LABEL_{number}" for number in range(count)]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    if problem_type:
        config["problem_type"] = problem_type
    return config
