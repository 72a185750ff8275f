"""Tiny random checkpoints in Hugging Face's layout, without torch and without the tables under test."""

import functools
import json
import math
import pathlib

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import dsee_jax
from dsee_jax import orientation, tree

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "every",
    "no",
    "some",
    "big",
    "red",
    "not",
    "is",
    "runs",
    ".",
)
VOCABULARY = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *WORDS,
    *"abcdefgh",
    *(f"##{letter}" for letter in "abcdefgh"),
)


FAMILIES: dict[str, dict] = {
    "bert": {"architectures": ["BertForSequenceClassification"]},
    "roberta": {"architectures": ["RobertaForSequenceClassification"], "type_vocab_size": 1},
    "xlm-roberta": {"architectures": ["XLMRobertaForSequenceClassification"], "type_vocab_size": 1},
    "deberta": {
        "architectures": ["DebertaForSequenceClassification"],
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_relative_positions": 5,
        "position_biased_input": False,
    },
    "mpnet": {
        "architectures": ["MPNetForSequenceClassification"],
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-5,
        "relative_attention_num_buckets": 32,
    },
}
"""``model_type`` -> the fields of `config` that differ from BERT's. The padding id is that of the tokenizer, 0."""


def config(model_type: str = "bert", **changes) -> dict:
    """Return the config.json of a tiny encoder whose sizes are all different."""
    return {
        "model_type": model_type,
        "vocab_size": len(VOCABULARY),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        **FAMILIES.get(model_type, {}),
    } | changes


def prefix_of(fields: dict) -> str:
    """Return the prefix of the tensor names of the backbone."""
    return fields["model_type"].removeprefix("xlm-") + "."


HEADS = {
    "bert.": ("bert.pooler.dense", "classifier"),
    "roberta.": ("classifier.dense", "classifier.out_proj"),
    "deberta.": ("pooler.dense", "classifier"),
    "mpnet.": ("classifier.dense", "classifier.out_proj"),
}
"""Prefix -> the two affine maps of sequence classification."""


def weights(fields: dict, *, seed: int = 0, labels: int = 2, head: bool = True) -> dict[str, np.ndarray]:
    """Return random float32 tensors under the names of Hugging Face's class for sequence classification."""
    width, neurons = fields["hidden_size"], fields["intermediate_size"]
    start, disentangled = prefix_of(fields), fields["model_type"] == "deberta"
    biased = fields["model_type"] == "mpnet"
    shapes = {f"{start}embeddings.word_embeddings.weight": (fields["vocab_size"], width)}
    if fields.get("position_biased_input", True):
        shapes[f"{start}embeddings.position_embeddings.weight"] = (fields["max_position_embeddings"], width)
    if fields["type_vocab_size"]:
        shapes[f"{start}embeddings.token_type_embeddings.weight"] = (fields["type_vocab_size"], width)
    if disentangled:
        shapes[f"{start}encoder.rel_embeddings.weight"] = (2 * fields["max_relative_positions"], width)
    if biased:
        rows = fields["relative_attention_num_buckets"]
        shapes[f"{start}encoder.relative_attention_bias.weight"] = (rows, fields["num_attention_heads"])
    norms, dense = [f"{start}embeddings.LayerNorm"], {}
    for layer in range(fields["num_hidden_layers"]):
        name = f"{start}encoder.layer.{layer}"
        if disentangled:
            shapes |= {f"{name}.attention.self.{part}": (width,) for part in ("q_bias", "v_bias")}
            shapes[f"{name}.attention.self.in_proj.weight"] = (3 * width, width)
            shapes[f"{name}.attention.self.pos_proj.weight"] = (width, width)
            dense[f"{name}.attention.self.pos_q_proj"] = (width, width)
        elif biased:
            dense |= {f"{name}.attention.attn.{part}": (width, width) for part in "qkvo"}
        else:
            dense |= {f"{name}.attention.self.{part}": (width, width) for part in ("query", "key", "value")}
        if not biased:
            dense[f"{name}.attention.output.dense"] = (width, width)
        dense[f"{name}.intermediate.dense"] = (neurons, width)
        dense[f"{name}.output.dense"] = (width, neurons)
        norms += [f"{name}.attention{'' if biased else '.output'}.LayerNorm", f"{name}.output.LayerNorm"]
    if head:
        pooler, last = HEADS[start]
        dense |= {pooler: (width, width), last: (labels, width)}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = np.random.default_rng(seed)
    # Far larger than real weights, so that attention is not uniform and a swapped tensor changes the outputs.
    tensors = {name: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: 1 + x if name.endswith("LayerNorm.weight") else x for name, x in tensors.items()}


def tokenizer(folder: pathlib.Path) -> None:
    """Write a WordPiece tokenizer over VOCABULARY that AutoTokenizer opens."""
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    wordpiece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wordpiece.add_special_tokens(list(VOCABULARY[:5]))
    wordpiece.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    special = ("pad", "unk", "cls", "sep", "mask")
    settings = {f"{name}_token": token for name, token in zip(special, VOCABULARY[:5], strict=True)}
    settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write(folder: pathlib.Path, fields: dict, tensors: dict[str, np.ndarray], *, shards: int = 1) -> pathlib.Path:
    """Write config.json, the tensors in ``shards`` files, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = [sorted(tensors)[number::shards] for number in range(shards)]
        files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
        for file, part in zip(files, names, strict=True):
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        placed = {name: file for file, part in zip(files, names, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    tokenizer(folder)
    return folder


def bert(
    folder: pathlib.Path,
    *,
    seed: int = 0,
    labels: int = 2,
    head: bool = True,
    prefix: bool = True,
    old_names: bool = False,
    shards: int = 1,
    **changes,
) -> pathlib.Path:
    """Write the checkpoint folder of an encoder, by default a BERT, and return the folder.

    Args:
      folder: the folder, which is created.
      seed: of the random weights.
      labels: rows of the classifier.
      head: with pooler and classifier.
      prefix: names start with the prefix of the family, such as ``bert.``; false: as in a bare BertModel.
      old_names: the params of norms are gamma and beta.
      shards: the number of files of the weights.
      **changes: fields of config.json.
    """
    fields = config(**changes)
    fields |= {
        "id2label": {str(number): f"LABEL_{number}" for number in range(labels)},
        "label2id": {f"LABEL_{number}": number for number in range(labels)},
    }
    tensors = weights(fields, seed=seed, labels=labels, head=head)
    if not prefix:
        tensors = {name.removeprefix(prefix_of(fields)): x for name, x in tensors.items()}
    if old_names:
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            tensors = {name.replace(new, old): x for name, x in tensors.items()}
    return write(folder, fields, tensors, shards=shards)


def batch(
    *, rows: int = 3, length: int = 12, padded: bool = True, types: int = 2, seed: int = 0, pad: int = 0
) -> dict[str, np.ndarray]:
    """Return random int32 inputs (rows, length) over VOCABULARY; row r of a padded batch ends in 2 r padding ids ``pad``."""
    generator = np.random.default_rng(seed)
    mask = np.ones((rows, length), np.int32)
    if padded:
        for row in range(rows):
            mask[row, length - 2 * row :] = 0
    ids = np.where(mask, generator.integers(5, len(VOCABULARY), (rows, length)), pad).astype(np.int32)
    kinds = np.where(mask, generator.integers(0, max(types, 1), (rows, length)), 0).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}


def params(module, *inputs, seed: int = 0) -> dict:
    """Return random params of a Linen module, from the shapes of its init: compiling the init would take too long."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: generator.normal(0.1, 0.3, leaf.shape).astype(leaf.dtype), shapes)


def adapter(params, config: dsee_jax.DeltaConfig, *, seed: int = 0, spread: float = 0.0) -> dsee_jax.Adapter:
    """Return an adapter of the shapes of `dsee_jax.deltas.init`, drawn by NumPy: compiling the init would take too long.

    Supports are random. ``a`` is small and ``b`` and ``values`` are zero, or, with a ``spread``, all are normal.
    """
    init = functools.partial(dsee_jax.deltas.init, config=config)
    shapes = jax.eval_shape(lambda params: init(params, key=jax.random.key(0)), params)
    generator, flat, stated = np.random.default_rng(seed), tree.flatten(params), dict(shapes.orientations)

    def delta(path, leaf):
        size = spread or 0.02 * path.endswith("/a")
        return jax.device_put((size * generator.normal(size=leaf.shape)).astype(leaf.dtype))

    def support(path, leaf):
        shape = flat[path].shape
        # The adapter has the orientations that are not usual.
        axes = stated.get(path, orientation.IN_OUT if len(shape) == 2 else orientation.STACKED)
        *stack, rows, columns = orientation.matrix_shape(shape, axes)
        pick = lambda: np.sort(generator.choice(rows * columns, leaf.shape[-2], replace=False))
        picked = np.stack([pick() for _ in range(math.prod(stack))])
        places = np.stack([picked // columns, picked % columns], -1)
        return jax.device_put(places.reshape(leaf.shape).astype(leaf.dtype))

    deltas = {path: delta(path, leaf) for path, leaf in tree.flatten(shapes.deltas).items()}
    supports = {path: support(path, leaf) for path, leaf in tree.flatten(shapes.supports).items()}
    return shapes.replace(deltas=tree.unflatten(deltas), supports=tree.unflatten(supports))
