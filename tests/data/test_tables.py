"""CSV and JSON lines with the columns of the config."""

from typing import Any

import numpy as np
import pytest

from dsee_jax.config import DataConfig
from dsee_jax.data import tables
from dsee_jax.errors import InputError
from dsee_jax.metrics import classification


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")


def test_csv_with_quoted_fields_is_read(tmp_path):
    """Quoted fields may contain commas, quotes and line breaks; classes are sorted, as numbers where they are numbers."""
    write(
        tmp_path,
        train_csv='premise,hypothesis,label\n"Yes, ""so"".",No.,10\n"two\nlines",b,2\n',
        dev_csv="label,premise,hypothesis\n2,c,d\n",
    )
    task = tables.load(
        DataConfig(source="csv", task="mine", dir=str(tmp_path), text="premise", pair="hypothesis", label="label")
    )
    assert (task.name, task.labels, task.num_labels) == ("mine", ("2", "10"), 2)
    assert task.train.text == ['Yes, "so".', "two\nlines"]
    assert task.train.pair == ["No.", "b"]
    np.testing.assert_array_equal(task.train.labels, [1, 0])
    assert task.dev["dev"].text == ["c"]
    np.testing.assert_array_equal(task.dev["dev"].labels, [0])


def test_jsonl_regression_with_a_validation_file_is_read(tmp_path):
    write(
        tmp_path,
        train_jsonl='{"s": "a", "y": 0.5}\n\n{"s": "b", "y": "2"}\n',
        validation_jsonl='{"y": 3, "s": "c"}\n',
    )
    task = tables.load(DataConfig(source="jsonl", dir=str(tmp_path), text="s", label="y", regression=True))
    assert task.regression
    assert task.train.pair is None
    assert task.train.labels.dtype == np.float32
    np.testing.assert_array_equal(task.train.labels, [0.5, 2.0])
    np.testing.assert_array_equal(task.dev["dev"].labels, [3.0])


@pytest.mark.parametrize(
    ("name", "labels", "regression", "metric"),
    [("mrpc", "xyz", False, "accuracy"), ("cola", "123", True, "pearson"), ("stsb", "xyz", False, "accuracy")],
)
def test_name_of_a_table_decides_no_metric(tmp_path, name, labels, regression, metric):
    """A table may be named as a task of GLUE; its metrics are those of its labels."""
    lines = "".join(f"{label},{label}\n" for label in labels)
    write(tmp_path, train_csv=f"sentence1,label\n{lines}", dev_csv=f"sentence1,label\n{lines}")
    task = tables.load(DataConfig(source="csv", task=name, dir=str(tmp_path), regression=regression))
    assert next(iter(classification.of_task(task.glue, regression=task.regression))) == metric
    values = np.arange(3.0)[:, None] if regression else np.eye(3)
    scores = classification.score(task.glue, values, task.dev["dev"].labels, regression=regression)
    assert scores[metric] == pytest.approx(1.0)


def test_configured_classes_keep_their_order(tmp_path):
    write(
        tmp_path,
        train_jsonl='{"sentence1": "a", "label": true}\n{"sentence1": "b", "label": false}\n',
        dev_jsonl='{"sentence1": "c", "label": true}\n',
    )
    task = tables.load(DataConfig(source="jsonl", dir=str(tmp_path), labels=("true", "false")))
    assert task.labels == ("true", "false")
    np.testing.assert_array_equal(task.train.labels, [0, 1])


@pytest.mark.parametrize(
    ("source", "train", "parts"),
    [
        ("csv", "sentence1,label\na,x\nb\n", [":3:", "1 columns, expected 2"]),
        ("csv", "sentence1,label\na,x\nb,y,z\n", [":3:", "3 columns, expected 2"]),
        ("csv", "sentence,label\na,x\n", [":2:", "no column 'sentence1'", "did you mean 'sentence'", "data.text"]),
        ("csv", 'sentence1,label\na,x\n"b,y\n', [":3:", "not CSV"]),
        ("csv", "sentence1,label\n", ["no rows"]),
        ("csv", "", ["empty"]),
        ("csv", "sentence1,label\na,x\nb,x\n", ["every label is 'x'"]),
        ("jsonl", '{"sentence1": "a", "label": "x"}\n{"sentence1": "a"\n', [":2:", "not JSON"]),
        ("jsonl", '{"sentence1": "a", "label": "x"}\n["a", "x"]\n', [":2:", "one JSON object"]),
        ("jsonl", '{"sentence1": "a", "label": "x"}\n{"sentence1": 3, "label": "x"}\n', [":2:", "no text"]),
    ],
)
def test_malformed_training_file_is_named(tmp_path, source, train, parts):
    write(tmp_path, **{f"train_{source}": train, f"dev_{source}": train or "x"})
    with pytest.raises(InputError) as error:
        tables.load(DataConfig(source=source, dir=str(tmp_path)))
    assert "\n" not in str(error.value)
    for part in (f"train.{source}", *parts):
        assert part in str(error.value)


def test_dev_label_outside_the_training_labels_is_named(tmp_path):
    write(tmp_path, train_csv="sentence1,label\na,yes\nb,no\n", dev_csv="sentence1,label\na,yes\nb,maybe\n")
    with pytest.raises(InputError, match=r"dev\.csv:3: label 'maybe' is outside the task; expected one of 'no', 'yes'"):
        tables.load(DataConfig(source="csv", dir=str(tmp_path)))


def test_listed_classes_may_differ_in_case_only(tmp_path):
    write(tmp_path, train_csv="sentence1,label\na,NaN\nb,nan\n", dev_csv="sentence1,label\na,nan\n")
    task = tables.load(DataConfig(source="csv", dir=str(tmp_path), labels=("nan", "NaN")))
    np.testing.assert_array_equal(task.train.labels, [1, 0])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*train\.csv"):
        tables.load(DataConfig(source="csv", dir=str(tmp_path / "nowhere")))
    write(tmp_path, train_csv="sentence1,label\na,yes\nb,no\n")
    with pytest.raises(InputError, match=r"no file .*dev\.csv or .*validation\.csv"):
        tables.load(DataConfig(source="csv", dir=str(tmp_path)))


BAD: dict[str, Any] = {
    "a repeated column": ("csv", "sentence1,label,label\na,1,2\n", "train.csv:1: the column 'label' is repeated"),
    "an empty label": ("csv", "sentence1,label\na,\nb,1\n", "train.csv:2: the label 'label' is ''; expected text"),
    "a space in a label": (
        "csv",
        "sentence1,label\na,no\nb, no\nc,yes\n",
        "train.csv: the labels ' no' and 'no' differ only",
    ),
    "a label in two cases": (
        "csv",
        "sentence1,label\na,No\nb,no\nc,yes\n",
        "train.csv: the labels 'No' and 'no' differ",
    ),
    "a number in two spellings": (
        "jsonl",
        '{"sentence1": "a", "label": 1}\n{"sentence1": "a", "label": 1.0}\n{"sentence1": "a", "label": 0}\n',
        "train.jsonl: the labels '1' and '1.0' differ only",
    ),
    "a missing value as text": (
        "csv",
        "sentence1,label\na,nan\nb,x\n",
        "train.csv: the label 'nan' stands for a missing",
    ),
    "NaN": ("jsonl", '{"sentence1": "a", "label": NaN}\n', "train.jsonl:1: 'label' is no text"),
    "a null": ("jsonl", '{"sentence1": "a", "label": null}\n', "train.jsonl:1: 'label' is no text"),
    "a nested label": ("jsonl", '{"sentence1": "a", "label": [1]}\n', "train.jsonl:1: the label 'label' is '\\[1\\]'"),
    "digits": ("jsonl", f'{{"sentence1": "a", "label": {"9" * 5000}}}\n', "train.jsonl:1: not JSON: Exceeds the limit"),
    "nesting": ("jsonl", '{"label": ' + "[" * 100_000 + "\n", "train.jsonl:1: not JSON"),
    "half a character": ("jsonl", '{"sentence1": "\\ud800", "label": 1}\n', "train.jsonl:1: not JSON: .* surrogates"),
    "a zip": ("csv", "\x1f\x8b", "train.csv:1: no|train.csv: no rows|not UTF-8"),
    "rows of many widths": ("csv", "sentence1,label\na,1,2\n", "train.csv:2: the row has 3 columns"),
    "a header alone": ("csv", "sentence1,label\n", "train.csv: no rows"),
    "blanks": ("csv", " \n\n", "train.csv: the file is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_table_is_one_line_with_its_place(tmp_path, name):
    source, text, message = BAD[name]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.{source}").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        tables.load(DataConfig(source=source, dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_long_text_and_long_numbers_are_read(tmp_path):
    rows = f"{'a' * 200_000},{'9' * 5000}\nb,1\n"
    write(tmp_path, train_csv=f"\ufeffsentence1,label\r\n{rows}", dev_csv=f"sentence1,label\n{rows}")
    task = tables.load(DataConfig(source="csv", dir=str(tmp_path)))
    assert len(task.train[0][0]) == 200_000
    assert task.labels == ("1", "9" * 5000)


def test_score_beyond_float32_is_refused(tmp_path):
    write(tmp_path, train_csv="sentence1,label\na,1e300\n", dev_csv="sentence1,label\na,1\n")
    with pytest.raises(InputError, match=r"train.csv:2: label '1e300' is outside the task"):
        tables.load(DataConfig(source="csv", dir=str(tmp_path), regression=True))


def test_labels_of_a_row_are_a_list_or_separated_text(tmp_path):
    """Any number of labels, none too; spaces around them do not count."""
    write(
        tmp_path,
        train_csv='sentence1,label\na,"red, big"\nb,\nc,red\n',
        dev_csv="sentence1,label\nd,big\n",
        train_jsonl='{"sentence1": "a", "label": ["big", "red"]}\n{"sentence1": "b", "label": []}\n',
        dev_jsonl='{"sentence1": "d", "label": "big, red"}\n',
    )
    task = tables.load(DataConfig(source="csv", dir=str(tmp_path), multi_label=True))
    assert (task.labels, task.problem_type) == (("big", "red"), "multi_label_classification")
    np.testing.assert_array_equal(task.train.labels, [[1, 1], [0, 0], [0, 1]])
    np.testing.assert_array_equal(task.dev["dev"].labels, [[1, 0]])
    task = tables.load(DataConfig(source="jsonl", dir=str(tmp_path), multi_label=True, labels=("red", "big", "old")))
    np.testing.assert_array_equal(task.train.labels, [[1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(task.dev["dev"].labels, [[1, 1, 0]])
    assert task.dev["dev"].labels.dtype == np.float32


@pytest.mark.parametrize(
    ("dev", "labels", "message"),
    [
        (
            '{"sentence1": "a", "label": []}\n{"sentence1": "d", "label": ["big", "bag"]}',
            (),
            r"dev.jsonl:2: label 'bag' is",
        ),
        (
            '{"sentence1": "d", "label": ["big", ["red"]]}',
            (),
            r"dev.jsonl:1: the label 'label' is '\[\"red\"\]'; expected",
        ),
        ('{"sentence1": "d", "label": []}', ("big",), r"every label is 'big'; a task needs two classes"),
    ],
)
def test_bad_labels_of_a_row_are_one_line_with_its_place(tmp_path, dev, labels, message):
    write(tmp_path, train_jsonl='{"sentence1": "a", "label": ["big", "red"]}\n' if not labels else dev, dev_jsonl=dev)
    with pytest.raises(InputError, match=message):
        tables.load(DataConfig(source="jsonl", dir=str(tmp_path), multi_label=True, labels=labels))


def test_table_without_a_label_in_any_row_is_refused(tmp_path):
    write(tmp_path, train_csv="sentence1,label\na,\n", dev_csv="sentence1,label\na,\n")
    with pytest.raises(InputError, match=r"train.csv: no row has a label in 'label'; a task needs two classes$"):
        tables.load(DataConfig(source="csv", dir=str(tmp_path), multi_label=True))
