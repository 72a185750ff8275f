"""Numbers of config.json that a merge cannot reconcile: the result has those of one model."""

import re
from typing import Any

from merge.inputs.sources import Source

_KEYS = re.compile(
    r"rope_\w+|\w*_act|hidden_act\w*|activation\w*|\w*eps|\w*epsilon|\w*sliding_window\w*|max_window_layers|layer_types"
    r"|scale_\w+|\w*_scal\w+|\w*softcap\w*|\w*multiplier|num_\w*heads|n_head\w*|head_dim|\w*rotary\w*|alibi\w*"
    r"|position_embedding_type|relative_attention\w*|pos_att_type|num_experts_per_tok|norm_topk_prob|\w*parallel_\w+"
)
"""The fields that change a model's outputs at equal weights."""
_SHOWN = 60
_ROPE_THETA = 10000.0
"""The value of an absent ``rope_theta`` in Hugging Face's configs."""


def differing(first: Source, other: Source) -> str:
    """Return one line that names the fields of ``other`` that change its outputs and differ from ``first``; empty: none.

    Fields that only one of the two has are compared if a null says the same as their absence.
    """
    ours, theirs = _flat(first.config), _flat(other.config)
    keys = [key for key in {**ours, **theirs} if _KEYS.fullmatch(key.rpartition(".")[2]) and _differ(key, ours, theirs)]
    if not keys:
        return ""
    listed = "; ".join(f"{key} is {_short(ours.get(key))} and {_short(theirs.get(key))}" for key in keys[:6])
    return f"{first.reference} and {other.reference} differ in config.json, and the result has the first's numbers: {listed}"


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    nested = {f"text_config.{key}": value for key, value in inner.items()} if isinstance(inner, dict) else {}
    return {**config, **nested}


def _differ(key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if key in ours and key in theirs:
        return ours[key] != theirs[key]
    # Versions of transformers write different fields; only these have one meaning where they are absent.
    absent = key.rpartition(".")[2] in ("rope_scaling", "sliding_window")
    newer = any("rope_parameters" in fields for fields in (ours, theirs))
    if key.rpartition(".")[2] == "rope_theta" and not newer:
        return ours.get(key, _ROPE_THETA) != theirs.get(key, _ROPE_THETA)
    return absent and not newer and ours.get(key) != theirs.get(key)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
