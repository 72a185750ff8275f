"""A decoder for lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), which scores it on benchmarks.

::

    import lm_eval
    from dsee_jax.generation.harness import HarnessLM

    results = lm_eval.simple_evaluate(HarnessLM("runs/writer"), tasks=["hellaswag", "gsm8k"])

Log likelihoods, windows of long texts and stop sequences follow the harness's own model for Hugging Face checkpoints. The
package ``lm_eval`` is optional (``pip install 'dsee-jax[lm-eval]'``).
"""

import functools
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.deltas import attach
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.errors import InputError
from dsee_jax.generation import pipeline, texts
from dsee_jax.models.architecture import Model
from dsee_jax.typing import Params

_PACKAGE = importlib.util.find_spec("lm_eval")
_TemplateLM: Any = importlib.import_module("lm_eval.api.model").TemplateLM if _PACKAGE else object

LENGTH = 2048
"""Tokens of the longest input of a model without a limit of its own; the harness's number for such models."""

SAMPLED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""The options of a task that apply to samples alone, and their values where the task gives none."""


class HarnessLM(_TemplateLM):
    """A decoder with its tokenizer and its updates, as a model of lm-evaluation-harness.

    Args:
      path: a model folder, GGUF file, hub id or package:NAME, or the folder of a run or of an export.
      adapter: an adapter of this library or of PEFT, in place of the run's own. Empty: none.
      dtype: of the matrix products, float32 or bfloat16.
      batch_size: texts per batch.
      seed: decides the samples of tasks that sample.

    Raises:
      InputError: as `dsee_jax.generation.pipeline.load`; lm_eval is not installed; or the tokenizer has neither a token that
        begins nor one that ends a text.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        adapter: str = "",
        dtype: str = "float32",
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        if not _PACKAGE:
            raise InputError("HarnessLM needs lm_eval: pip install 'dsee-jax[lm-eval]'")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected 1 or more")
        super().__init__()
        self.writer = pipeline.load(path, other=adapter, dtype=dtype)
        self.tokenizer = self.writer.tokenizer
        self.batch_size, self.key = batch_size, jax.random.key(seed)
        self.max_length = self.writer.model.config.longest or LENGTH
        if self.prefix_token_id is None:
            raise InputError(
                f"{path}: the tokenizer has no bos_token and no eos_token: empty contexts need one of them"
            )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one of a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as one prompt, by the template of the tokenizer."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text; a text that already has its first special token gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log probability of each continuation after its context, and whether greedy search would choose it."""
        for each in requests:
            if (count := len(each[2])) > self.max_length:
                raise InputError(
                    f"a continuation has {count} tokens; the model reads {self.max_length} at a time: score it "
                    "with loglikelihood_rolling"
                )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number][1] + requests[number][2]))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            rows = [(requests[number][1] + requests[number][2])[-self.max_length - 1 :] for number in numbers]
            length = min(-(-(len(rows[0]) - 1) // texts.MULTIPLE) * texts.MULTIPLE, self.max_length)
            # The last batch has empty rows, so that all batches of a length have one shape.
            ids, mask, scored = np.zeros((3, self.batch_size, length + 1), np.int32)
            for row, (number, tokens) in enumerate(zip(numbers, rows, strict=True)):
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
                scored[row, len(tokens) - len(requests[number][2]) : len(tokens)] = 1
            sums, greedy = _score(self.writer.model, self.writer.params, self.writer.adapter, ids, mask, scored)
            for number, total, exact in zip(numbers, sums.tolist(), greedy.tolist(), strict=False):
                answers[number] = (total, exact)
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each whole text, in windows of ``max_length`` tokens that predict every token once."""
        utils = importlib.import_module("lm_eval.utils")
        windows = [
            (number, None, *utils.make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
        ]
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens([window[1:] for window in windows])
        for (number, *_), (value, _) in zip(windows, answers, strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text after each context, up to the first stop sequence of its task.

        Raises:
          InputError: a task asks for an option of generation that this library does not have.
        """
        helpers = importlib.import_module("lm_eval.models.utils")
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        written = [""] * len(requests)
        for numbers in groups.values():
            options = helpers.normalize_gen_kwargs(requests[numbers[0]].args[1])
            stops, new = options.pop("until"), options.pop("max_gen_toks")
            if new >= self.max_length:
                raise InputError(f"a task asks for {new} new tokens, and the model has {self.max_length} positions")
            rows = [self.tok_encode(requests[number].args[0])[new - self.max_length :] for number in numbers]
            chosen = _options(options)
            key = self.key if chosen["temperature"] else None
            results = texts.generate(self.writer, rows, batch_size=self.batch_size, key=key, new_tokens=new, **chosen)
            for number, text in zip(numbers, results, strict=True):
                written[number] = helpers.postprocess_generated_text(text, stops, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, written[number])
        return written


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `dsee_jax.generate` for those of a task; those of samples apply to tasks that sample alone."""
    names = {"do_sample", "num_beams", *SAMPLED}
    if unknown := set(options) - names:
        raise InputError(f"a task asks for {', '.join(sorted(unknown))}, and generation has {', '.join(sorted(names))}")
    sampled = {name: options.get(name, value) for name, value in SAMPLED.items()}
    if not options["do_sample"] or not sampled["temperature"]:
        sampled = {"temperature": 0.0}
    return {**sampled, "beams": options.get("num_beams", 1)}


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: Model, params: Params, adapter: Adapter | None, ids: jax.Array, mask: jax.Array, scored: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the sums (rows,) of the log probabilities of the tokens that are ``scored``, and whether all of a row are greedy.

    ``ids``, ``mask`` (0 = padding, on the right) and ``scored`` are (rows, length + 1); the last token is no input.
    """
    targets, scored = ids[:, 1:], scored[:, 1:] != 0
    batch = {"input_ids": ids[:, :-1], "attention_mask": mask[:, 1:]}
    logits = attach.apply(model, params, adapter, batch).astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    greedy = jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~scored, axis=1)
    return jnp.sum(jnp.where(scored, chosen, 0.0), axis=1), greedy
