"""Prompts with their completions: your CSV or JSON lines, and the E2E NLG dataset from its CSV.

A JSON line is ``{"prompt": ..., "completion": ...}`` or ``{"messages": [{"role": ..., "content": ...}, ...]}``. The last
message is the assistant's; its content is the completion. A CSV has the columns prompt and completion. Lines with equal
prompts are several references for one input.
"""

from collections.abc import Mapping
from typing import Any

from dsee_jax.config import DataConfig
from dsee_jax.data import tables
from dsee_jax.data.examples import Prompts, Task
from dsee_jax.errors import InputError, did_you_mean


def load(config: DataConfig) -> Task:
    """Return the task of the train and dev files in ``data.dir``, named ``data.task``, or e2e.

    E2E (Novikova et al. 2017, arXiv 1706.09254): the prompt is the meaning representation in the column ``mr``, the
    completion a space and the text in the column ``ref``.

    Raises:
      InputError: a file is missing, empty or malformed, a column is missing, a completion is empty, or messages are no chat
        that ends with the assistant's; the message has the file and line.
    """
    if config.source == "e2e":
        paths = tables.files(config, ["trainset.csv"], ["devset.csv"])
        name, read = "e2e", _meaning
    else:
        paths = tables.files(config)
        name, read = config.task, _example
    splits = {}
    for split, path in paths.items():
        prompts = Prompts([], [], [])
        for line, row in tables.rows(path, config.source):
            where = f"{path}:{line}"
            prompt, completion = read(row, where)
            if not completion.strip():
                raise InputError(f"{where}: the completion is empty: add a text or delete the line")
            prompts.prompt.append(prompt)
            prompts.completion.append(completion)
            prompts.where.append(where)
        if not prompts.where:
            raise InputError(f"{path}: no rows; expected prompts and completions")
        splits[split] = prompts
    return Task(name, (), splits["train"], {"dev": splits["dev"]})


def _meaning(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    prompt, text = _texts(row, ("mr", "ref"), where, "the columns mr and ref of E2E")
    return prompt, " " + text.strip()


def _example(row: Mapping[str, Any], where: str) -> tuple[str | list[dict[str, Any]], str]:
    if "messages" in row:
        return _chat(row["messages"], where)
    return _texts(row, ("prompt", "completion"), where, "prompt and completion, or messages")


def _texts(row: Mapping[str, Any], names: tuple[str, str], where: str, expected: str) -> tuple[str, str]:
    for name in names:
        if name not in row:
            near = did_you_mean(name, row.keys() - set(names))
            raise InputError(f"{where}: no {name!r}{near}; expected {expected}, found {', '.join(map(repr, row))}")
        if not isinstance(row[name], str):
            raise InputError(f"{where}: {name!r} is {str(row[name])[:40]!r}; expected a string")
    return row[names[0]], row[names[1]]


def _chat(messages: Any, where: str) -> tuple[list[dict[str, Any]], str]:
    """Return all messages but the last, and the content of the last."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise InputError(f"{where}: 'messages' is {str(messages)[:40]!r}; expected a list of two or more messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(
                f"{where}: message {number} is {str(message)[:40]!r}; expected strings 'role' and 'content'"
            )
    *before, last = messages
    if last["role"] != "assistant":
        raise InputError(
            f"{where}: the last message has the role {last['role']!r}; expected 'assistant', whose message is the completion"
        )
    return before, last["content"]
