"""Prompt files: E2E's CSV, JSON lines and CSV; errors have the file and line."""

import collections
import json

import pytest

from dsee_jax import data
from dsee_jax.config import DataConfig
from dsee_jax.errors import InputError

LINES = [
    {"prompt": "a", "completion": " b"},
    {"prompt": "a", "completion": " c"},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}]},
]


def jsonl(folder, lines=LINES, *, name="train.jsonl"):
    for file in {name, "train.jsonl", "dev.jsonl"}:
        (folder / file).write_text(
            "\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines) + "\n"
        )
    return DataConfig(source="jsonl", task="mine", dir=str(folder))


def test_json_lines_are_read(tmp_path):
    task = data.load(jsonl(tmp_path), seed=0, task="causal-lm")
    assert task.causal
    assert not task.regression
    assert (task.name, task.labels) == ("mine", ())
    assert task.train.prompt == ["a", "a", [{"role": "user", "content": "u"}]]
    assert task.train.completion == [" b", " c", "x"]
    assert task.train.where[2] == f"{tmp_path / 'train.jsonl'}:3"


def test_csv_files_of_other_names_are_read(tmp_path):
    for name in ("mine", "other"):
        (tmp_path / f"{name}.csv").write_text(f'prompt,completion\n{name},"of\ntwo lines"\nb,c\n')
    config = DataConfig(source="csv", task="t", dir=str(tmp_path), train_file="mine.csv", dev_file="other.csv")
    task = data.load(config, seed=0, task="causal-lm")
    assert task.train.prompt == ["mine", "b"]
    assert task.dev["dev"].prompt == ["other", "b"]
    assert task.train.completion == ["of\ntwo lines", "c"]
    assert [where.rpartition(":")[2] for where in task.train.where] == ["3", "4"]


def test_prompts_are_drawn_in_their_order(tmp_path):
    config = DataConfig(**vars(jsonl(tmp_path, LINES * 5)) | {"examples": 4})
    task = data.load(config, seed=0, task="causal-lm")
    assert [len(column) for column in task.train] == [4] * 3
    assert len(task.dev["dev"].prompt) == 15
    assert [int(where.rpartition(":")[2]) for where in task.train.where] == sorted(
        int(where.rpartition(":")[2]) for where in task.train.where
    )


def test_e2e_rows_are_read(shared):
    """Every row is a pair; rows of one input are its references."""
    names = {"train_file": "devset.csv", "dev_file": "testset_w_refs.csv"}
    config = DataConfig(source="e2e", dir=str(shared / "data" / "e2e"), **names)
    task = data.load(config, seed=0)
    assert (task.name, task.causal) == ("e2e", True)
    assert (len(task.train.prompt), len(task.dev["dev"].prompt)) == (4672, 4693)
    assert len(collections.Counter(task.dev["dev"].prompt)) == 630
    assert task.train.prompt[0] == "name[Alimentum], area[city centre], familyFriendly[no]"
    assert task.train.completion[0] == " There is a place in the city centre, Alimentum, that is not family-friendly."
    with pytest.raises(InputError, match=r"data\.dir: no file .*trainset\.csv"):
        data.load(DataConfig(source="e2e", dir=str(shared / "data" / "e2e")), seed=0)


BAD = {
    "no JSON": ("{", "not JSON"),
    "no object": ("[1]", "expected one JSON object per line"),
    "no completion": ({"prompt": "a"}, "no 'completion'; expected prompt and completion, or messages, found 'prompt'"),
    "a misspelt name": ({"prompt": "a", "completions": "b"}, r"no 'completion' \(did you mean 'completions'\?\)"),
    "no string": ({"prompt": 3, "completion": "b"}, "'prompt' is '3'; expected a string"),
    "an empty completion": ({"prompt": "a", "completion": " \n"}, "the completion is empty"),
    "no messages": ({"messages": "hello"}, "'messages' is 'hello'; expected a list of two or more messages"),
    "one message": ({"messages": [{"role": "user", "content": "u"}]}, "expected a list of two or more messages"),
    "a message without a role": (
        {"messages": [{"content": "u"}, {"role": "assistant", "content": "x"}]},
        "message 0 is \"{'content': 'u'}\"; expected strings 'role' and 'content'",
    ),
    "the user last": (
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "u"}]},
        "the last message has the role 'user'; expected 'assistant'",
    ),
    "an empty answer": (
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": ""}]},
        "the completion is empty",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_line_is_named(tmp_path, name):
    line, message = BAD[name]
    with pytest.raises(InputError, match=rf"train\.jsonl:2: .*{message}"):
        data.load(jsonl(tmp_path, [LINES[0], line]), seed=0, task="causal-lm")


def test_missing_file_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    config = DataConfig(source="jsonl", dir=str(tmp_path))
    with pytest.raises(InputError, match=r"data\.dir: no file .*dev\.jsonl or .*validation\.jsonl"):
        data.load(config, seed=0, task="causal-lm")
    with pytest.raises(InputError, match=r"data\.dev_file: no file .*mine\.jsonl"):
        data.load(DataConfig(**vars(config) | {"dev_file": "mine.jsonl"}), seed=0, task="causal-lm")
    with pytest.raises(InputError, match=r"data\.dir: empty; data\.source 'e2e' reads files"):
        data.load(DataConfig(source="e2e"), seed=0)
