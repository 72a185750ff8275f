"""Adapters as models: this library's and those in PEFT's layout, folded into the base's tensors while they are read."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax import hf_layout, tree
from dsee_jax.ckpt import adapter, peft, tensors
from dsee_jax.ckpt.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MASKS, PEFT_WEIGHTS
from dsee_jax.errors import InputError, did_you_mean
from merge.inputs import lazy, roles
from merge.inputs.lazy import Lazy

log = logging.getLogger(__name__)

_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""The classes that PEFT tunes for its ``task_type``, but for those that write text."""

_HEAD = "lm_head.weight"
"""The name that a tied output matrix gets when it is stored on its own."""


class Adapted(NamedTuple):
    """A model with an adapter folded in."""

    tensors: dict[str, Lazy]
    files: list[Path]  # of the adapter
    config: dict[str, Any]  # the model's config.json


def adapted(folder: Path, config: dict[str, Any], base: Mapping[str, Lazy]) -> Adapted:
    """Return a base with an adapter folded in.

    The result is the model that was trained: PEFT's with the adapter attached. An adapter for another class brings its head:
    the config gets the class and the labels. If an adapter changes an embedding without the output matrix that is tied to it,
    the result is untied; if an adapter has more rows of tokens, so has the result.

    Args:
      folder: of the adapter.
      config: the base's config.json.
      base: its tensors.

    Raises:
      InputError: no adapter, a damaged or unsupported adapter, or an adapter of another model: every tensor of the adapter
        must match a tensor of the base.
    """
    if (folder / ADAPTER_WEIGHTS).exists():
        return _ours(folder, config, base)
    if (folder / PEFT_WEIGHTS).exists() or (folder / peft.PICKLE).exists():
        return _peft(folder, config, base)
    raise InputError(f"{folder} holds no adapter: expected {ADAPTER_WEIGHTS}, or {PEFT_WEIGHTS} as PEFT writes it")


def _ours(folder: Path, config: dict[str, Any], base: Mapping[str, Lazy]) -> Adapted:
    from dsee_jax.ckpt import hf_names  # imports Flax and every architecture, which other merges do not need

    saved, file = adapter.load(folder), folder / ADAPTER_WEIGHTS
    supports, params, masks = tree.flatten(saved.supports), tree.flatten(saved.params), tree.flatten(saved.masks)
    updates: dict[str, dict[str, np.ndarray]] = {path: {} for path in [*masks, *supports]}
    for path, leaf in tree.flatten(saved.deltas).items():
        parent, _, part = path.rpartition("/")
        updates.setdefault(parent, {})[part] = np.asarray(leaf, np.float32)
    scale = float(saved.config["scale"])
    sparse = scale if saved.config["scale_sparse"] else 1.0
    places = hf_names.locations(config, [*updates, *params], base)
    adapted_tensors = dict(base)
    for path, leaf in params.items():
        name, (transposed, *_) = places[path]
        adapted_tensors[name] = lazy.from_array(leaf.T if transposed else leaf, file)
    for path, update in updates.items():
        name, layout = places[path]
        kernel = _matrix(adapted_tensors, name, f"{file}: the update of {path!r}")
        shape_in_out = kernel.shape[::-1] if layout.transposed else kernel.shape
        # This kernel's columns in a tensor that several kernels share; their updates are folded in one after the other.
        columns = hf_layout.outputs(layout, shape_in_out[1])
        shape = (shape_in_out[0], len(columns))
        support, mask = supports.get(path), masks.get(path)
        if not _fits(shape, update, support) or (mask is not None and mask.shape != shape):
            raise InputError(f"{file}: the update of {path!r} does not fit {shape}, the shape of its kernel")
        factors = None
        if "a" in update:
            left, right = update["a"] * np.float32(scale), np.zeros((len(update["b"]), shape_in_out[1]), np.float32)
            right[:, columns] = update["b"]
            factors = (right.T, left.T) if layout.transposed else (left, right)
        scattered = None
        if support is not None:
            row, column = support[:, 0].astype(np.int64), columns[support[:, 1]]
            flat = column * shape_in_out[0] + row if layout.transposed else row * shape_in_out[1] + column
            order = np.argsort(flat, kind="stable")
            scattered = flat[order], update["values"][order] * np.float32(sparse)
        bits = None
        if mask is not None:
            full_mask = np.ones(shape_in_out, bool)
            full_mask[:, columns] = mask
            bits = np.packbits(full_mask.T if layout.transposed else full_mask)
        adapted_tensors[name] = lazy.adapted(kernel, file, factors=factors, sparse=scattered, kept=bits)
    files = [folder / ADAPTER_CONFIG, file, *([folder / MASKS] if masks else [])]
    new = [places[path][0] for path in params]
    labels = saved.config.get("labels")
    adapted_tensors, config = _classifier(
        config, adapted_tensors, new, "ForSequenceClassification", labels if isinstance(labels, list) else []
    )
    return Adapted(adapted_tensors, files, config)


def _classifier(
    config: dict[str, Any], tensors: dict[str, Lazy], new: Collection[str], task: str, labels: Sequence[str] = ()
) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """Return the tensors and the config of a model whose head an adapter brings: with its class, without other heads.

    Args:
      config: of the base.
      tensors: with the adapter.
      new: the names of the adapter's own tensors.
      task: the end of the name of the class.
      labels: names of the classes, if the adapter has them.
    """
    heads = roles.heads(tensors)
    own = [name for name in new if name in heads and "pooler." not in name]
    if not own:
        return tensors, config
    modules = {name.partition(".")[0] for name in own}
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in heads or "pooler." in name or name.partition(".")[0] in modules
    }
    count = min((tensors[name].shape[0] for name in own if len(tensors[name].shape) == 2), default=0)
    config = config | roles.for_task(config, task)
    if count and task != "ForQuestionAnswering" and (labels or len(config.get("id2label") or ()) != count):
        names = labels if len(labels) == count else [f"LABEL_{number}" for number in range(count)]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
        config.pop("num_labels", None)
    return kept, config


def _fits(shape: tuple[int, ...], update: Mapping[str, np.ndarray], support: np.ndarray | None) -> bool:
    """Return whether an update is complete and fits a kernel of ``shape`` (in, out)."""
    shapes = {part: leaf.shape for part, leaf in update.items()}
    low, values = {part: size for part, size in shapes.items() if part != "values"}, shapes.get("values")
    if low:
        rank = low.get("b", (0,))[:1]
        if low != {"a": (*shape[:1], *rank), "b": (*rank, *shape[1:])}:
            return False
    if values is None or support is None:
        return values is None and support is None
    valid = support.shape == (*values, 2) and bool(np.all((support >= 0) & (support < shape)))
    return len(values) == 1 and valid


def _peft(folder: Path, config: dict[str, Any], base: Mapping[str, Lazy]) -> Adapted:
    read = peft.read(folder)
    file, settings, embedding = read.file, read.settings, _embedding(config, base)
    new: dict[str, Lazy] = {}  # the tensors that the adapter replaces or adds
    for name, stored in read.saved.items():
        where, replaced = f"{file}: {name!r}", peft.within(name, settings.get("modules_to_save") or ())
        target = _target(name, base, where, embedding, replaced=replaced)
        new[target] = _replacing(lazy.plain(stored), target, base, where, replaced=replaced)
    adapted_tensors = {**base, **new}
    layers_in_out, in_out = _layers_in_out(base), bool(settings.get("fan_in_fan_out"))
    for module, update in read.updates.items():
        where = f"{file}: the update of {module!r}"
        name, kernel = _kernel(adapted_tensors, module, where, embedding)
        transposed = update.embedding or (
            in_out if layers_in_out is None or roles.outside_layers(name) else layers_in_out
        )
        factors = sparse = None
        if update.a.size:
            left, right = (update.a.T, update.b.T) if transposed else (update.b, update.a)
            if (left.shape[0], right.shape[1]) != kernel.shape:
                raise InputError(f"{where} is {left.shape} times {right.shape}; {name!r} of the base is {kernel.shape}")
            factors = left * np.float32(update.scale), right
        if update.indices.size:
            size = kernel.shape[0] * kernel.shape[1]
            if transposed or update.indices[0] < 0 or update.indices[-1] >= size:
                raise InputError(
                    f"{where} has values at {update.indices[0]} to {update.indices[-1]}; {name!r} of the base is "
                    f"{kernel.shape}{', of no linear layer' if transposed else ''}"
                )
            sparse = update.indices, update.values
        adapted_tensors[name] = lazy.adapted(kernel, file, factors=factors, sparse=sparse)
    only_tokens = not embedding or adapted_tensors[embedding] is base[embedding]
    for module, values in read.tokens.items():
        where = f"{file}: the tokens of {module!r}"
        name, matrix = _kernel(adapted_tensors, module, where, embedding)
        adapted_tensors[name] = _with_tokens(matrix, values, _indices(settings, module, where), file, where)
    if embedding:
        config = _untied(config, base, adapted_tensors, embedding, only_tokens=only_tokens, where=str(file))
    config = _resized(config, base, adapted_tensors, str(file))
    if task := _TASKS.get(str(settings.get("task_type"))):
        adapted_tensors, config = _classifier(config, adapted_tensors, new, task)
    return Adapted(adapted_tensors, [folder / ADAPTER_CONFIG, file], config)


def _layers_in_out(base: Mapping[str, Lazy]) -> bool | None:
    """Return whether the kernels of a base's layers are stored (in, out), as those of GPT-2; None: no bias tells.

    PEFT decides by the class of each module; ``fan_in_fan_out`` in its file is that of the last module alone.
    """
    for name, tensor in base.items():
        bias = base.get(f"{name.removesuffix('weight')}bias")
        if bias is not None and not roles.outside_layers(name) and len({*tensor.shape}) == 2 == len(tensor.shape):
            return bias.shape == tensor.shape[1:]
    return None


def _embedding(config: Mapping[str, Any], base: Mapping[str, Lazy]) -> str | None:
    """Return the embedding to which the output matrix of a base is tied, or None."""
    if not roles.is_tied(config):
        return None
    size = roles.vocab_size(config)
    return next((name for name, tensor in base.items() if roles.is_matrix_of_tokens(name, tensor, size, True)), None)


def _is_output(name: str) -> bool:
    return (
        roles.outside_layers(name)
        and roles.of_tokens(name)
        and not roles.is_embedding(name)
        and name.endswith(".weight")
    )


def _target(name: str, base: Mapping[str, Lazy], where: str, embedding: str | None, *, replaced: bool) -> str:
    """Return the name, in the base's spelling, of a tensor that an adapter replaces or adds."""
    near = [name] if name in base else _near(name, base)
    if len(near) == 1:
        return near[0]
    if replaced or (embedding and _is_output(name)):
        return name
    raise InputError(f"{where}: the base has no tensor {name!r}{did_you_mean(name, base)}; is it the adapter's base?")


def _replacing(tensor: Lazy, name: str, base: Mapping[str, Lazy], where: str, *, replaced: bool) -> Lazy:
    """Return a tensor that fits the place of the base's: a saved module, or a matrix of tokens, may have other rows."""
    old = base.get(name, tensor)
    same = tensor.shape == old.shape
    resized = len(tensor.shape) == len(old.shape) > 0 and (replaced or tensor.shape[1:] == old.shape[1:])
    if not same and not (resized and (replaced or roles.of_tokens(name))):
        raise InputError(f"{where} is {tensor.shape}; the base has {old.shape} there: is it the adapter's base?")
    return tensor


def _kernel(base: Mapping[str, Lazy], module: str, where: str, embedding: str | None) -> tuple[str, Lazy]:
    """Return the name and the matrix that an update of a module changes; a tied output matrix is the embedding's."""
    name = f"{module}.weight"
    if embedding and name not in base and not _near(name, base) and _is_output(name):
        return name, base[embedding]
    name = _name(name, base, where)
    return name, _matrix(base, name, where)


def _indices(settings: Mapping[str, Any], module: str, where: str) -> list[int]:
    """Return the rows of a module that PEFT trained."""
    given = settings.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((rows for key, rows in given.items() if f".{module}".endswith(f".{key}")), None)
    if not isinstance(given, list) or not all(type(row) is int and row >= 0 for row in given):
        raise InputError(f"{where}: trainable_token_indices of {ADAPTER_CONFIG} has no list of rows for it")
    return given


def _with_tokens(matrix: Lazy, values: np.ndarray, rows: list[int], file: Path, where: str) -> Lazy:
    if values.shape != (len(rows), matrix.shape[1]) or max(rows, default=-1) >= matrix.shape[0]:
        raise InputError(f"{where}: {values.shape} for {len(rows)} rows of a matrix {matrix.shape}; they do not fit")
    return lazy.with_rows(matrix, file, np.asarray(rows, np.int64), values)


def _untied(
    config: dict[str, Any],
    base: Mapping[str, Lazy],
    tensors: dict[str, Lazy],
    embedding: str,
    *,
    only_tokens: bool,
    where: str,
) -> dict[str, Any]:
    """Return the config of a tied base with an adapter; the output matrix joins ``tensors`` where it has become another.

    In PEFT a module is changed alone: its tied partner keeps the base's values. Rows of tokens are trained in both.
    """
    output = next((name for name in tensors if _is_output(name)), None)
    if output is None:
        followed = only_tokens or tensors[embedding].shape != base[embedding].shape
        if tensors[embedding] is base[embedding] or followed:
            return config
        if not roles.writes_text(config):
            log.warning("%s changes %s: an output matrix that is tied to it follows", where, embedding)
            return config
        output, tensors[_HEAD] = _HEAD, base[embedding]
    if tensors[output] is base.get(output) and tensors[embedding] is base[embedding]:
        return config
    if tensors[output].shape != tensors[embedding].shape:
        raise InputError(
            f"{where}: {output} has {tensors[output].shape[0]} rows and the tied {embedding} {tensors[embedding].shape[0]}; "
            "save the adapter with both (save_embedding_layers=True)"
        )
    if lazy.equal(tensors[output], tensors[embedding]):
        if output not in base:
            del tensors[output]
        return config
    log.warning("%s: %s and %s are trained apart: the model is untied", where, output, embedding)
    return roles.changed(config, "tie_word_embeddings", False)


def _resized(
    config: dict[str, Any], base: Mapping[str, Lazy], tensors: Mapping[str, Lazy], where: str
) -> dict[str, Any]:
    """Return the config with the number of rows of the matrices of tokens, which must have equal numbers of rows."""
    size = roles.vocab_size(config)
    sizes = {
        name: tensors[name].shape[0]
        for name, tensor in base.items()
        if name in tensors and roles.outside_layers(name) and roles.is_vocabulary(name, tensor, size)
    }
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {rows} rows" for name, rows in sizes.items())
        raise InputError(f"{where}: the adapter resizes not all matrices of tokens: {listed}; save it with all of them")
    rows = next(iter(sizes.values()), size)
    return config if rows == size else roles.changed(config, "vocab_size", rows)


def _near(name: str, base: Mapping[str, Lazy]) -> list[str]:
    """Return the base's names for a tensor; either name may lack the model's prefix of the other."""
    return [other for other in base if name.endswith(f".{other}") or other.endswith(f".{name}")]


def _name(name: str, base: Mapping[str, Lazy], where: str) -> str:
    """Return the base's name for a tensor."""
    near = [name] if name in base else _near(name, base)
    if len(near) != 1:
        raise InputError(
            f"{where}: the base has no tensor {name!r}{did_you_mean(name, base)}; is it the adapter's base?"
        )
    return near[0]


def _matrix(base: Mapping[str, Lazy], name: str, where: str) -> Lazy:
    if name not in base:
        raise InputError(
            f"{where}: the base has no tensor {name!r}{did_you_mean(name, base)}; is it the adapter's base?"
        )
    kernel = base[name]
    if len(kernel.shape) != 2 or kernel.dtype not in tensors.FLOATS:
        raise InputError(f"{where}: {name!r} of the base is {kernel.dtype} {kernel.shape}; expected a matrix of floats")
    return kernel
