"""Random damage to the files that a user writes: every input is read, or refused with one line, at once."""

import copy
import json
import pathlib
import random
import signal

import pytest

import decoders
import fuzz
import tiny
from dsee_jax import data
from dsee_jax.ckpt import hf
from dsee_jax.config import DataConfig
from dsee_jax.data import prompts, tables
from dsee_jax.errors import InputError
from dsee_jax.export import run_template
from dsee_jax.generation import pipeline
from dsee_jax.train import config_file

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs an alarm"),
    pytest.mark.filterwarnings("ignore"),
]
COUNT = 2000

VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.5, 1e300, float("inf"), float("nan")),
    *("", "x", "null", "1e5", "\0", "\u202e", "a" * 5000, "../..", [], {}, [[]], [None], {"a": {"b": 1}}, ["a", 1]),
]
BYTES = [
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\t", b"*a ", b"&a ", b"!!int ", b"? ", b"<<: *a\n", b"- "),
    *(b"{", b"[", b'"'),
]


def damaged(random_: random.Random, text: bytes) -> bytes:
    """Return a text with one to three places deleted, repeated, or filled with something else."""
    for _ in range(random_.randint(1, 3)):
        at, to = sorted(random_.randint(0, len(text)) for _ in range(2))
        to = min(to, at + 40)
        part = random_.choice([b"", text[at:to] * 2, random_.choice(BYTES), bytes(random_.randbytes(3))])
        text = text[:at] + part + text[to:]
    return text


def changed(random_: random.Random, value):
    """Return a JSON value with one to three values replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(random_.randint(1, 3)):
        node = value
        while isinstance(node, dict | list) and node:
            key = random_.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if random_.random() < 0.5 or not isinstance(node[key], dict | list) or not node[key]:
                break
            node = node[key]
        else:
            break
        if random_.random() < 0.2:
            del node[key]
        else:
            node[key] = copy.deepcopy(random_.choice(VALUES))
    return value


def survives(read, kind: type[Exception] = InputError) -> None:
    """Assert that ``read`` returns, or raises ``kind`` with one line, within `fuzz.SECONDS`."""

    try:
        with fuzz.limited():
            read()
    except kind as error:
        assert "\n" not in str(error)  # noqa: PT017


def outside(folder: pathlib.Path) -> set[pathlib.Path]:
    return {path for path in folder.rglob("*") if "work" not in path.parts}


def test_config(tmp_path):
    random_ = random.Random(0)
    files = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.yaml"))
    path = tmp_path / "work.yaml"
    before = outside(tmp_path)
    for _ in range(COUNT):
        path.write_bytes(damaged(random_, random_.choice(files).read_bytes()))
        survives(lambda: config_file.dump(config_file.read(path)).encode())
    assert outside(tmp_path) - {path} == before


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("csv", b'a "quoted"" text",no\n'),
        ("jsonl", b'{"sentence1": "a \\u00e9", "label": 1}\n{"sentence1": "b", "label": 2.5}\n'),
    ],
)
def test_table(tmp_path, source, row):
    random_ = random.Random(1)
    text = (b"sentence1,label\nb,yes\n" if source == "csv" else b"") + row * 3
    for number in range(COUNT):
        for split in ("train", "dev"):
            (tmp_path / f"{split}.{source}").write_bytes(damaged(random_, text))
        config = DataConfig(source=source, dir=str(tmp_path), regression=number % 2 == 0)  # pyright: ignore[reportArgumentType]
        survives(lambda config=config: tables.load(config))


def test_prompts(tmp_path):
    random_ = random.Random(2)
    rows = [
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    for _ in range(COUNT):
        for split in ("train", "dev"):
            text = "".join(json.dumps(changed(random_, row)) + "\n" for row in rows).encode()
            (tmp_path / f"{split}.jsonl").write_bytes(text if random_.random() < 0.5 else damaged(random_, text))
        survives(lambda: prompts.load(DataConfig(source="jsonl", dir=str(tmp_path))))


@pytest.mark.parametrize(
    ("source", "name", "task", "row"),
    [
        ("conll", "conll", "token-classification", b"a B-A\nb O\n\n\xc3\xa9 O\n"),
        ("jsonl", "jsonl", "token-classification", b'{"tokens": ["a", "b"], "tags": ["O", "B-A"]}\n'),
        ("text", "jsonl", "causal-lm", b'{"text": "a \\u00e9"}\n'),
        (
            "squad",
            "json",
            "question-answering",
            b'{"data": [{"paragraphs": [{"context": "a b", "qas": [{"question": "q", "answers": '
            b'[{"text": "b", "answer_start": 2}]}]}]}]}',
        ),
    ],
)
def test_data_of_other_tasks(tmp_path, source, name, task, row):
    random_ = random.Random(1)
    for _ in range(COUNT):
        for split in ("train", "dev"):
            (tmp_path / f"{split}.{name}").write_bytes(damaged(random_, row))
        survives(lambda: data.load(DataConfig(source=source, dir=str(tmp_path)), seed=0, task=task))


@pytest.mark.parametrize("kind", ["bert", *decoders.KINDS])
def test_model_config(tmp_path, kind):
    random_ = random.Random(3)
    folder = tmp_path / "model"
    (tiny.bert if kind == "bert" else decoders.write)(folder, model_type=kind)
    fields = json.loads((folder / "config.json").read_text())
    for _ in range(COUNT // 6):
        text = json.dumps(changed(random_, fields)).encode()
        (folder / "config.json").write_bytes(text if random_.random() < 0.7 else damaged(random_, text))
        survives(lambda: hf.load_pretrained(folder, "causal-lm" if kind != "bert" else "sequence-classification", 2))


def test_generation_config(tmp_path):
    random_ = random.Random(4)
    folder = decoders.write(tmp_path / "model")
    fields = {
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
        "repetition_penalty": 1.2,
        "min_length": 0,
        "sequence_bias": {},
    }
    for _ in range(COUNT):
        text = json.dumps(changed(random_, fields)).encode()
        (folder / "generation_config.json").write_bytes(text if random_.random() < 0.7 else damaged(random_, text))
        survives(lambda: (pipeline.ends(folder, NO_TOKENIZER), pipeline._file_options(folder)))


class NO_TOKENIZER:
    """The end of text of a tokenizer without one."""

    eos_token_id = None


def test_rows_of_the_exported_program():
    random_ = random.Random(5)
    signature = {"vocab_size": 10, "longest": 4, "pad_token_id": 0}
    for _ in range(COUNT):
        text = json.dumps(changed(random_, [[1, 2, 3], [4]]))
        if random_.random() < 0.5:
            text = damaged(random_, text.encode()).decode(errors="replace")
        survives(lambda text=text: run_template.padded(run_template.rows(text, signature), signature), ValueError)
