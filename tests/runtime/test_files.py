"""The log of a run: rewinding to a checkpoint, and incomplete lines after a crash."""

import json

import numpy as np
import pytest

from dsee_jax.runtime import files


def test_rewind_keeps_finished_stages_and_earlier_steps(tmp_path):
    path = tmp_path / "log.jsonl"
    records = [
        {"stage": s, "step": n} for s, n in (("tune", 1), ("tune", 2), ("retune", 1), ("retune", 2), ("retune", 3))
    ]
    for record in records:
        files.append(path, record)
    files.rewind(path, ["tune"], "retune", 2)
    assert files.read(path) == records[:4]


def test_incomplete_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append(path, {"stage": "tune", "step": 1})
    with path.open("a") as file:
        file.write('{"stage": ')
    assert files.read(path) == [{"stage": "tune", "step": 1}]
    assert files.read(tmp_path / "none") == []


@pytest.mark.parametrize("garbage", [b"}{", b"\xff\xfe\x00", b"[1]", b"", b"[" * 10**5])
def test_damaged_line_is_left_out_and_named(tmp_path, caplog, garbage):
    path = tmp_path / "log.jsonl"
    for step in (1, 2):
        files.append(path, {"stage": "tune", "step": step})
        if step == 1:
            path.write_bytes(path.read_bytes() + garbage + b"\n")
    files.rewind(path, [], "tune", 2)
    assert f"{path}:2 is damaged" in caplog.text
    assert path.read_text() == '{"stage": "tune", "step": 1}\n{"stage": "tune", "step": 2}\n'


def test_file_is_replaced(tmp_path):
    files.write(tmp_path / "m.json", {"a": 1})
    files.write(tmp_path / "m.json", {"a": 2})
    assert (tmp_path / "m.json").read_text() == '{\n "a": 2\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """JSON has no other way to write them; they are replaced in the log as well, at any depth."""
    record = {"a": float("nan"), "b": [1.5, (float("inf"), np.float64("-inf"))], "c": {"d": float("nan"), "e": "NaN"}}
    expected = {"a": None, "b": [1.5, [None, None]], "c": {"d": None, "e": "NaN"}}
    files.write(tmp_path / "m.json", record)
    files.append(tmp_path / "log.jsonl", record)
    assert json.loads((tmp_path / "m.json").read_text()) == expected
    assert files.read(tmp_path / "log.jsonl") == [expected]
