"""Tensor names of one architecture in different spellings: prefixes, wrappers, old names of norms, buffers.

The same tensor is ``bert.encoder.layer.0...`` in a model with a head and ``encoder.layer.0...`` in a bare model, has an
``_orig_mod`` in its name after ``torch.compile``, and a norm has ``gamma`` or ``weight``. The prefixes are found from the
names and shapes of two checkpoints, not from a list of architectures.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARAMS = {
    "gamma": "weight",
    "beta": "bias",
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
_BUFFERS = re.compile(
    r"(?:.*\.)?(?:position_ids|(?:original_)?inv_freq|(?:cos|sin)_cached|masked_bias|relative_position_index"
    r"|embeddings\.token_type_ids|relative_coords_table|_float_tensor|num_batches_tracked)"
)
_CUTS = 3
"""The most leading parts of a name that a prefix has."""
_RULES = 8
"""The most prefixes in which two checkpoints differ."""


def is_buffer(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is computed from the configuration, such as position ids, rotary frequencies, a causal mask."""
    # A causal mask is named as a bias, and is (1, 1, length, length); a bias has one axis.
    mask = len(shape) == 4 and re.fullmatch(r"(?:.*\.)?\w*att(?:n|ention)\.bias", name)
    return bool(mask or _BUFFERS.fullmatch(name))


def unwrapped(name: str) -> str:
    """Return a name without the wrappers of data parallelism and compilation, and with today's params of ``LayerNorm``."""
    name = ".".join(part for part in name.removeprefix("module.").split(".") if part not in _WRAPPERS)
    module, _, param = name.rpartition(".")
    return f"{module}.{_PARAMS[param]}" if module.endswith("LayerNorm") and param in ("gamma", "beta") else name


def renamed(tensors: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, str]:
    """Return ``{name: its spelling in another checkpoint}`` for every tensor of a checkpoint.

    A tensor that the other checkpoint lacks gets the prefix that the tensors beside it have there.

    Args:
      tensors: with shapes, by name.
      like: the tensors of the other checkpoint, likewise.
    """
    theirs = {_general(name): name for name in like} | {name: name for name in like}
    patterns = {pattern(name): tuple(tensor.shape) for name, tensor in like.items()}
    spelled = {name: unwrapped(name) for name in tensors}
    for _ in range(_RULES):
        rule = _prefix({pattern(spelled[name]): tuple(tensor.shape) for name, tensor in tensors.items()}, patterns)
        if rule is None:
            break
        taken = {*spelled.values()}
        spelled = {
            name: current if _general(current) in theirs else _moved(current, *rule, theirs, taken)
            for name, current in spelled.items()
        }
    result = {name: theirs.get(current) or theirs.get(_general(current), current) for name, current in spelled.items()}
    # Two tensors of one spelling are two tensors: the checkpoints differ in more than the spelling.
    counts = Counter(result.values())
    return {name: spelling if counts[spelling] == 1 else name for name, spelling in result.items()}


def paired(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, str]:
    """Return ``{name in a: name in b}`` of the tensors, with shapes, that two checkpoints share, in the order of ``a``."""
    ours = {spelling: name for name, spelling in renamed(b, a).items()}
    return {name: ours[name] for name in a if name in ours}


def _general(name: str) -> str:
    """Return the name without wrappers, with today's name of its param."""
    module, _, param = unwrapped(name).rpartition(".")
    return f"{module}.{_PARAMS.get(param, param)}" if module else param


def pattern(name: str) -> str:
    """Return the general name without numbers of layers and experts: a few patterns stand for all tensors."""
    return ".".join("#" if part.isdigit() else part for part in _general(name).split("."))


def _prefix(
    names: Mapping[str, tuple[int, ...]], like: Mapping[str, tuple[int, ...]]
) -> tuple[str, str, frozenset[str]] | None:
    """Return the prefix that most unmatched names have, its spelling in ``like``, and the first parts after the prefix.

    Names are patterns. None if no prefix makes half of the names match that have it. One of the two prefixes has all parts of
    the other: ``encoder.`` and ``decoder.`` are two modules.
    """
    lacking = [name for name in names if name not in like]
    targets = [name for name in like if name not in names]
    tails: dict[str, list[str]] = {}
    for name in targets:
        for prefix, tail in _tails(name):
            tails.setdefault(tail, []).append(prefix)
    matches: dict[tuple[str, str], list[str]] = {}
    for name in lacking:
        done: set[str] = set()
        for old, tail in _tails(name):
            for new in tails.get(tail, ()):
                fits = names[name][1:] == like[new + tail][1:]
                if new + tail not in done and fits and _contained(old, new):
                    matches.setdefault((old, new), []).append(tail)
                done.add(new + tail)
    if not matches:
        return None
    (old, new), best = max(matches.items(), key=lambda entry: len(entry[1]))
    rivals = [rule for rule in matches if rule != (old, new) and (rule[0] == old or rule[1] == new)]
    clear = all(len(matches[rule]) < len(best) for rule in rivals)
    sizes = [sum(name.startswith(prefix) for name in group) for prefix, group in ((old, lacking), (new, targets))]
    if not clear or 2 * len(best) < min(sizes):
        return None
    return old, new, frozenset(tail.partition(".")[0] for tail in best)


def _tails(name: str) -> list[tuple[str, str]]:
    """Return ``(prefix, rest)`` for the shortest prefixes, the rest of two parts or more."""
    parts = name.split(".")
    cuts = range(min(_CUTS, len(parts) - 2) + 1)
    return [("".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])) for cut in cuts]


def _contained(old: str, new: str) -> bool:
    short, long = sorted((Counter(prefix.split(".")[:-1]) for prefix in (old, new)), key=Counter.total)
    return old != new and short <= long


def _moved(
    name: str, old: str, new: str, after: frozenset[str], theirs: Collection[str], taken: Collection[str]
) -> str:
    """Return a name with another prefix, if the prefix covers it and no other tensor has that name."""
    moved = new + name[len(old) :]
    # Without a prefix, only the modules that are known to move: a head has the same name in both.
    known = bool(old) or name.partition(".")[0] in {"pooler", *after} or _general(moved) in theirs
    return moved if name.startswith(old) and known and moved not in taken else name
