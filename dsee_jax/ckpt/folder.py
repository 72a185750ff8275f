"""What the folder of a model holds besides its weights, in Hugging Face's layout."""

import json
from pathlib import Path
from typing import Any

from dsee_jax.errors import InputError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises `InputError` when it is missing or holds anything else."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: is {path.parent} the folder of a model?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; expected an object of fields")
    return found
