"""Text generation by greedy search, sampling and beam search, in one compiled loop over a key-value cache.

The model is any causal-lm that `dsee_jax.apply` runs: plain, with updates attached, folded, or compacted.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import prng
from dsee_jax.config import check_types
from dsee_jax.deltas import attach
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.errors import InputError, shorten
from dsee_jax.models.architecture import Model
from dsee_jax.models.cache import branch, create, follow
from dsee_jax.typing import Array, Key, Params

_NEVER = -1e9  # below the score of any sequence; the value of Hugging Face


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the choice of the next token.

    Raises:
      InputError: a value is out of its range, or sampling is combined with beams.
    """

    new_tokens: int = 64
    """The most tokens to add."""
    eos: Sequence[int] = ()
    """End-of-text ids; the first of them ends a row and is part of its tokens."""
    pad: int = 0
    """The id that fills a row after its end."""
    beams: int = 1
    """Above 1: beam search with this number of beams; the result is the sequence with the highest score."""
    length_penalty: float = 1.0
    """beams: a score is the sum of log probabilities over length ** length_penalty."""
    early_stopping: bool = False
    """beams: stop as soon as the number of ended sequences is the number of beams."""
    temperature: float = 0.0
    """0: the most probable token. Above 0: a sample from the softmax of logits / temperature."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the fewest most probable tokens whose probabilities sum to p or more; in (0, 1]."""
    repetition_penalty: float = 1.0
    """Above 1: logits (beams: log probabilities) of tokens of the prompt and of tokens already chosen are divided by the
    penalty where they are positive and multiplied by it where they are negative (arXiv 1909.05858, section 4.1)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("new_tokens", 1), ("beams", 1), ("top_k", 0), ("temperature", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if not all(-(2**31) <= token < 2**31 for token in (*self.eos, self.pad)):
            raise InputError(f"eos is {shorten(repr(self.eos))} and pad {self.pad}; expected token ids")
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; expected a number above 0, 1 for none")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected a number in (0, 1]")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise InputError("top_k and top_p apply to sampling only: also give a temperature above 0")
        if self.beams > 1 and self.temperature:
            raise InputError(f"beams is {self.beams} and temperature {self.temperature}: beam search does not sample")


def pad_left(rows: Sequence[Sequence[int]], *, pad: int = 0, multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask (1 = token, 0 = padding), int32 (rows, length) each, padded on the left to a ``multiple``.

    ``rows``: one or more, of one token id or more.
    """
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), np.int32)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
        mask[number, length - len(row) :] = 1
    return ids, mask


def generate(
    model: Model,
    params: Params,
    input_ids: Array,
    attention_mask: Array | None = None,
    *,
    adapter: Adapter | None = None,
    **options: Any,
) -> jax.Array:
    """Return the new tokens after each prompt, int32 (batch, new_tokens), filled with ``pad`` after the end of a row.

    Greedy and beam search choose the same tokens as Hugging Face's.

    Args:
      model: from ``load_pretrained(path, task="causal-lm")``, or compacted.
      params: the params of the model.
      input_ids: int (batch, length), padded on the left (`pad_left`). Every new length and set of options is compiled once.
      attention_mask: (batch, length), 0 = padding; None: no padding.
      adapter: the updates to attach, as in `dsee_jax.apply`.
      **options: ``new_tokens`` (64), ``eos`` (none), ``pad`` (0), ``beams`` (1), ``length_penalty`` (1.0), ``early_stopping``
        (False), ``temperature`` (0: greedy), ``top_k`` (0: all), ``top_p`` (1.0, in (0, 1]) and ``repetition_penalty`` (1.0,
        above 0), see `Options`; and ``key``, which decides the samples and is needed with a temperature. Beams and a
        temperature exclude each other.

    Raises:
      InputError: an option is out of range, an array has another shape, a prompt has no tokens or is padded on the right,
        sampling has no key, or a prompt and its new tokens exceed the model's positions.
    """
    key = options.pop("key", None)
    chosen = Options(**options)
    ids = jnp.asarray(input_ids)
    if ids.ndim != 2 or not (jnp.issubdtype(ids.dtype, jnp.integer) or not ids.size):
        raise InputError(f"input_ids is {ids.dtype}{ids.shape}; expected whole numbers (batch, length), see pad_left")
    ids = ids.astype(jnp.int32)
    mask = np.ones(ids.shape, np.int32) if attention_mask is None else np.not_equal(attention_mask, 0).astype(np.int32)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask is of the shape {mask.shape}; expected {ids.shape}, that of input_ids")
    if getattr(model, "task", "causal-lm") != "causal-lm":
        raise InputError(f"the model has the task {model.task!r}: load it with task='causal-lm' to generate")
    if not ids.size or not mask[:, -1].all():
        raise InputError("a prompt has no tokens or is padded on the right: pad on the left (generation.pad_left)")
    longest, most = model.config.longest, int(mask.sum(1).max())
    if longest is not None and most + chosen.new_tokens > longest:
        raise InputError(
            f"a prompt of {most} tokens and {chosen.new_tokens} new ones are more than the model's {longest} positions: "
            "shorten the prompt or ask for fewer"
        )
    if chosen.beams > model.config.vocab_size:
        raise InputError(f"beams is {chosen.beams}; expected at most the {model.config.vocab_size} tokens of the model")
    if chosen.temperature and key is None:
        raise InputError("sampling needs a key: pass key=jax.random.key(seed)")
    key = jax.random.key(0) if key is None else key
    prng.check(key)
    return _generate(model, chosen, params, adapter, ids, jnp.asarray(mask), key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    model: Model,
    options: Options,
    params: Params,
    adapter: Adapter | None,
    ids: jax.Array,
    mask: jax.Array,
    key: Key,
) -> jax.Array:
    def step(tokens: jax.Array, cache: Any, mask: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """Return the logits after ``tokens`` (rows, length), and the cache with the tokens added.

        (rows, length, vocabulary), or with a mask (rows, 1, vocabulary), those of the last position.
        """
        batch = {"input_ids": tokens, "attention_mask": mask, "cache": cache, "last_only": mask is not None}
        return attach.apply(model, params, adapter, batch)

    # The tokens of beams get slots of their own after the prompt is read.
    more = options.new_tokens - 1 if options.beams == 1 else 0
    logits, cache = step(ids, create(model, ids.shape[0], ids.shape[1] + more), mask)
    logits = logits[:, -1]
    words = 0 if options.repetition_penalty == 1 else logits.shape[-1]
    seen = _mark(jnp.zeros((len(ids), words), bool), ids, mask != 0)
    if options.beams > 1:
        return _beam_search(step, logits, cache, seen, options)
    return _sequential(step, logits, cache, seen, options, key)


def _mark(seen: jax.Array, tokens: jax.Array, real: Any = True) -> jax.Array:
    """Return bool ``seen`` (rows, words), with ``tokens`` (rows, n) set where ``real``; words is 0 without a penalty."""
    if not seen.shape[-1]:
        return seen
    return seen.at[jnp.arange(len(seen))[:, None], tokens].max(real)


def _penalize(scores: jax.Array, seen: jax.Array, options: Options) -> jax.Array:
    """Return scores (..., vocabulary), lowered by the repetition penalty where ``seen``."""
    penalty = options.repetition_penalty
    if penalty == 1:
        return scores
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


class _Rows(NamedTuple):
    """The loop state of greedy search and sampling: one sequence per row."""

    count: jax.Array  # () int32: tokens chosen # pyright: ignore[reportIncompatibleMethodOverride]
    tokens: jax.Array  # (rows, new_tokens)
    ended: jax.Array  # (rows,) bool
    logits: jax.Array  # (rows, vocabulary) of the next token
    seen: jax.Array  # (rows, vocabulary) bool: in the prompt or chosen
    cache: Any


def _sequential(step: Any, logits: jax.Array, cache: Any, seen: jax.Array, options: Options, key: Key) -> jax.Array:
    """Return the tokens of greedy search or sampling, int32 (rows, new_tokens)."""
    rows = logits.shape[0]

    def choose(state: _Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = _penalize(state.logits, state.seen, options)
        if options.temperature:
            drawn = jax.random.categorical(jax.random.fold_in(key, state.count), filter_logits(logits, options))
        else:
            drawn = jnp.argmax(logits, axis=-1)
        token = jnp.where(state.ended, options.pad, drawn).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1)
        return token, tokens, state.ended | _ends(token, options)

    def advance(state: _Rows) -> _Rows:
        token, tokens, ended = choose(state)
        logits, cache = step(token[:, None], state.cache)
        return _Rows(state.count + 1, tokens, ended, logits[:, -1], _mark(state.seen, token[:, None]), cache)

    tokens = jnp.full((rows, options.new_tokens), options.pad, jnp.int32)
    state = _Rows(jnp.zeros((), jnp.int32), tokens, jnp.zeros(rows, bool), logits, seen, cache)
    # The last token is chosen after the loop: the model need not read it.
    state = jax.lax.while_loop(lambda s: (s.count < options.new_tokens - 1) & ~jnp.all(s.ended), advance, state)
    return choose(state)[1]


def _ends(tokens: jax.Array, options: Options) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(options.eos, jnp.int32))


def filter_logits(logits: jax.Array, options: Options) -> jax.Array:
    """Return logits / temperature (rows, vocabulary), -inf where top_k and then top_p exclude a token."""
    scores = logits / options.temperature
    if 0 < options.top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, options.top_k)[0][:, -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if options.top_p < 1:
        order = jnp.sort(scores, axis=-1, descending=True)
        probabilities = jax.nn.softmax(order, axis=-1)
        # A token is included while its predecessors sum to less than p; the first always is.
        included = jnp.cumsum(probabilities, axis=-1) - probabilities < options.top_p
        least = jnp.min(jnp.where(included, order, jnp.inf), axis=-1, keepdims=True)
        # Of the tokens that are as probable as the last included one, the first.
        above, tied = scores > least, scores == least
        room = jnp.sum(included, axis=-1, keepdims=True) - jnp.sum(above, axis=-1, keepdims=True)
        scores = jnp.where(above | (tied & (jnp.cumsum(tied, axis=-1) <= room)), scores, -jnp.inf)
    return scores


class _Beams(NamedTuple):
    """The loop state of a beam search: for every row the live beams and the best ended sequences."""

    count: jax.Array  # () int32: tokens chosen # pyright: ignore[reportIncompatibleMethodOverride]
    tokens: jax.Array  # (rows, beams, new_tokens)
    scores: jax.Array  # (rows, beams): sums of log probabilities
    done_tokens: jax.Array  # (rows, beams, new_tokens)
    done_scores: jax.Array  # (rows, beams): best first, with the length penalty
    done: jax.Array  # (rows, beams) bool: whether the slot has an ended sequence
    improvable: jax.Array  # (rows, 1) bool: whether a live beam can still exceed the worst ended sequence
    blocked: jax.Array  # () bool: whether all candidates have ended
    log_probs: jax.Array  # (rows, beams, vocabulary) of the next token
    seen: jax.Array  # (rows, beams, vocabulary) bool: in the prompt or chosen
    cache: Any  # with the beams as branches


def _beam_search(step: Any, logits: jax.Array, cache: Any, seen: jax.Array, options: Options) -> jax.Array:
    """Return the tokens of the best sequences, int32 (rows, new_tokens), with the stopping bounds of Hugging Face."""
    rows, beams, new = logits.shape[0], options.beams, options.new_tokens
    candidates = max(2, 1 + len(options.eos)) * beams

    def gather(values: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, places.reshape(*places.shape, *(1,) * (values.ndim - 2)), axis=1)

    def choose(state: _Beams) -> tuple[_Beams, jax.Array]:
        """Return the state with one more token, and the parent beam of each live beam, (rows, beams)."""
        size = state.log_probs.shape[-1]
        log_probs = _penalize(state.log_probs, state.seen, options)
        sums = (log_probs + state.scores[:, :, None]).reshape(rows, beams * size)
        sums, places = jax.lax.top_k(sums, candidates)
        origin, token = places // size, (places % size).astype(jnp.int32)
        tokens = gather(state.tokens, origin)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, :, None], state.count, axis=2)
        length = state.count + 1
        ended = _ends(token, options) | (length >= new)
        scores, live = jax.lax.top_k(sums + jnp.where(ended, _NEVER, 0.0), beams)
        # Only the best candidates may end; the others keep the number of live beams up.
        done = ended & (jnp.arange(candidates) < beams)[None]
        done_scores = sums / length.astype(jnp.float32) ** options.length_penalty + jnp.where(done, 0.0, _NEVER)
        full = jnp.all(state.done, axis=1, keepdims=True) & options.early_stopping
        done_scores += jnp.where(full, _NEVER, 0.0) + jnp.where(state.improvable, 0.0, _NEVER)
        merged = jnp.concatenate([state.done_scores, done_scores], axis=1)
        done_scores, best = jax.lax.top_k(merged, beams)
        done_tokens = gather(jnp.concatenate([state.done_tokens, tokens], axis=1), best)
        done = gather(jnp.concatenate([state.done, done], axis=1), best)
        possible = scores[:, :1] / length.astype(jnp.float32) ** options.length_penalty
        worst = jnp.where(done, jnp.min(done_scores, axis=1, keepdims=True), _NEVER)
        state = state._replace(
            count=length,
            tokens=gather(tokens, live),
            scores=scores,
            done_tokens=done_tokens,
            done_scores=done_scores,
            done=done,
            improvable=state.improvable & jnp.any(possible > worst, axis=1, keepdims=True),
            blocked=jnp.all(ended),
        )
        return state, gather(origin, live)

    def unfinished(state: _Beams) -> jax.Array:
        stopped = jnp.all(state.done) & options.early_stopping
        return jnp.any(state.improvable) & ~stopped & ~state.blocked

    def advance(state: _Beams) -> _Beams:
        state, origin = choose(state)
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=2, keepdims=False)
        logits, cache = step(last, follow(state.cache, origin))
        seen = gather(state.seen, origin).reshape(rows * beams, state.seen.shape[-1])
        seen = _mark(seen, last.reshape(-1, 1)).reshape(state.seen.shape)
        return state._replace(log_probs=jax.nn.log_softmax(logits), seen=seen, cache=cache)

    empty = jnp.full((rows, beams, new), options.pad, jnp.int32)
    state = _Beams(
        count=jnp.zeros((), jnp.int32),
        tokens=empty,
        # All beams start equal: only the first has a score.
        scores=jnp.where(jnp.arange(beams) > 0, _NEVER, 0.0)[None] * jnp.ones((rows, 1)),
        done_tokens=empty,
        done_scores=jnp.full((rows, beams), _NEVER),
        done=jnp.zeros((rows, beams), bool),
        improvable=jnp.ones((rows, 1), bool),
        blocked=jnp.zeros((), bool),
        log_probs=jnp.broadcast_to(jax.nn.log_softmax(logits)[:, None], (rows, beams, logits.shape[-1])),
        seen=jnp.broadcast_to(seen[:, None], (rows, beams, seen.shape[-1])),
        # One step at least is compiled, also for one new token.
        cache=branch(cache, beams, beams * max(new - 1, 1)),
    )
    state = jax.lax.while_loop(lambda s: unfinished(s) & (s.count < new - 1), advance, state)
    state = jax.lax.cond(unfinished(state), lambda s: choose(s)[0], lambda s: s, state)
    return state.done_tokens[:, 0]
