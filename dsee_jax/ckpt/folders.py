"""The names of the files in the folders of runs, models and adapters."""

import json
from typing import Any

from dsee_jax.ckpt import first_bytes
from dsee_jax.errors import InputError
from dsee_jax.runtime import storage

CONFIG, LOG, METRICS = "config.yaml", "metrics.jsonl", "metrics.json"
"""In the folder of a run: the resolved config, one record per logged step, and the final figures (of a finished run only)."""

TEXTS = "texts_{}.jsonl"
"""In the folder of a run: the texts that the model writes at the end of the stage in braces, one record per prompt."""

HASHES = "hashes.json"
"""In the folder of a run: the SHA-256 of its inputs and of its model, see `dsee_jax.train.hashes`."""

LATENCY = "latency.json"
"""In the folder of a run: the measured times of its target, see `dsee_jax.train.target`."""

TRACKED = "tracked.json"
"""In the folder of a run: its id in trackers, see `dsee_jax.train.trackers`."""

MODEL, ADAPTER = "model", "adapter"
CHECKPOINTS, TEACHER, PRUNED = storage.NOT_DOWNLOADED
"""Subfolders of a run: the model in Hugging Face's layout, the trained updates, the checkpoints to resume from, the teacher of
a distillation with its outputs, and the weights that pruning changed (`dsee_jax.train.kernels`)."""

MODEL_CONFIG, ADAPTER_CONFIG = storage.LAST
"""The configuration of a model, and of an adapter of this library or of PEFT, in their folders."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights of a model: in one file, or the index of the shards."""

ADAPTER_WEIGHTS, PEFT_WEIGHTS = "adapter.safetensors", "adapter_model.safetensors"
"""The trained arrays in the folder of an adapter, of this library and of PEFT."""

MASKS, KEPT = "masks.safetensors", "kept.safetensors"
"""In the folder of an adapter: one bit per pruned weight; one bit per head and neuron of a structurally pruned model (in the
folder of such a model too)."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("spm.model", "sentencepiece.model", "source.spm", "target.spm", "target_vocab.json", "vocab.bpe", "encoder.json"),
    *("bpe.codes", "dict.txt", "tekken.json", "tiktoken.model", "chat_template.json", "normalizer.json", "emoji.json"),
)

GENERATION = "generation_config.json"
"""The settings by which a decoder generates, such as the tokens that end a text; in the folder of a model."""

CARD = "README.md"
"""The model card, in the folder of a model or of an export."""

MODEL_FILES = (
    CARD,
    *(MODEL_CONFIG, GENERATION, KEPT, *TOKENIZER_FILES),
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
)
"""Patterns of all files in the folder of a model that this library writes."""

ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, MASKS, KEPT)
"""All files in the folder of an adapter that this library writes."""


def read_json(path: storage.Place) -> dict[str, Any]:
    """Return the object in a JSON file; raises `InputError` if the file is missing or holds anything else."""
    content = b""
    try:
        content = path.read_bytes()
        value = json.loads(content)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: is {path.parent} the folder of a model?") from None
    except (OSError, ValueError, RecursionError) as error:
        if kind := first_bytes.describe(content[: first_bytes.LENGTH]):
            raise InputError(f"{path} is {kind}") from None
        raise InputError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; expected an object of fields")
    return value
