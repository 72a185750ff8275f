"""The nine layouts of GLUE, on tiny files; errors have the file and line."""

import numpy as np
import pytest

from dsee_jax.data import glue
from dsee_jax.errors import InputError
from glue_files import FILES, NAMES, write


@pytest.mark.parametrize("inner", [True, False], ids=["GLUE's folder", "the task's folder"])
@pytest.mark.parametrize("task", FILES)
def test_every_task_is_read_from_its_layout(tmp_path, task, inner):
    write(tmp_path / NAMES[task] if inner else tmp_path, task)
    loaded = glue.load(task, str(tmp_path))
    _, _, text, pair, labels = FILES[task]
    assert (loaded.name, loaded.glue) == (task, task)
    assert set(loaded.dev) == ({"dev_matched", "dev_mismatched"} if task == "mnli" else {"dev"})
    assert loaded.regression == (task == "stsb")
    assert loaded.num_labels == {"stsb": 1, "mnli": 3}.get(task, 2)
    for examples in (loaded.train, *loaded.dev.values()):
        assert examples.text == text
        assert examples.pair == pair
        assert examples.labels.dtype == (np.float32 if task == "stsb" else np.int32)
        np.testing.assert_array_equal(examples.labels, labels)


def test_carriage_return_is_no_part_of_a_label(tmp_path):
    """Files with Windows line ends."""
    write(tmp_path, "rte")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    np.testing.assert_array_equal(glue.load("rte", str(tmp_path)).train.labels, [0, 1])


@pytest.mark.parametrize(
    ("task", "row", "parts"),
    [
        ("rte", "7\tonly one sentence\tentailment", ["train.tsv:3", "3 columns", "expected 4"]),
        ("rte", "7\ta\tb\tentailmnt", ["train.tsv:3", "'entailmnt'", "did you mean 'entailment'"]),
        ("sst2", "a film\t2", ["train.tsv:3", "'2'", "'0', '1'"]),
        ("cola", "gj04\t1\tno sentence", ["train.tsv:2", "3 columns", "expected 4"]),
        ("stsb", "0\tg\tf\t2012\t1\tn\tn\ta\tb\tgood", ["train.tsv:3", "'good'", "not a number"]),
        ("stsb", "0\tg\tf\t2012\t1\tn\tn\ta\tb\t5.5", ["train.tsv:3", "'5.5'", "from 0.0 to 5.0"]),
        ("stsb", "0\tg\tf\t2012\t1\tn\tn\ta\tb\tnan", ["train.tsv:3", "'nan'"]),
        ("qqp", "0\t1\t2\tWho?", ["train.tsv:3", "4 columns", "expected 6"]),
    ],
)
def test_malformed_row_is_named(tmp_path, task, row, parts):
    write(tmp_path, task, [FILES[task][1][0], row])
    with pytest.raises(InputError) as error:
        glue.load(task, str(tmp_path))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_torn_rows_of_qqp_are_skipped_with_a_warning(tmp_path, caplog):
    """A few rows of the published QQP are torn by line breaks inside a question."""
    rows = FILES["qqp"][1] * 1000
    write(tmp_path, "qqp", [*rows, "9\t1\t2\tWho", "is it?\tWhy?"])
    loaded = glue.load("qqp", str(tmp_path))
    assert len(loaded.train.text) == len(rows)
    assert "skipped 2 incomplete rows" in caplog.text


def test_missing_or_malformed_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*nowhere.*RTE/train\.tsv"):
        glue.load("rte", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"looked for .*RTE/train\.tsv and .*train\.tsv"):
        glue.load("rte", str(tmp_path))
    with pytest.raises(InputError, match=r"no task 'rtee'.*did you mean 'rte'"):
        glue.load("rtee", str(tmp_path))
    write(tmp_path, "rte", splits=["train"])
    with pytest.raises(InputError, match=r"dev\.tsv: No such file"):
        glue.load("rte", str(tmp_path))
    (tmp_path / "dev.tsv").write_text("")
    with pytest.raises(InputError, match=r"dev\.tsv: the file is empty"):
        glue.load("rte", str(tmp_path))
    (tmp_path / "dev.tsv").write_text(FILES["rte"][0] + "\n")
    with pytest.raises(InputError, match=r"dev\.tsv: no rows"):
        glue.load("rte", str(tmp_path))
    (tmp_path / "dev.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    with pytest.raises(InputError, match=r"dev\.tsv:1: no column 'label'"):
        glue.load("rte", str(tmp_path))
    (tmp_path / "dev.tsv").write_bytes(FILES["rte"][0].encode() + b"\n0\ta\xff\tb\tentailment\n")
    with pytest.raises(InputError, match=r"dev\.tsv:2: not UTF-8"):
        glue.load("rte", str(tmp_path))


@pytest.mark.parametrize(("task", "train", "dev"), [("rte", 2490, 277), ("sst2", 67349, 872), ("stsb", 5749, 1500)])
def test_real_files_have_the_published_sizes(shared, task, train, dev):
    """The numbers of rows are the published ones, so no quote joins several rows."""
    loaded = glue.load(task, str(shared / "data" / "glue"))
    assert (len(loaded.train.labels), len(loaded.dev["dev"].labels)) == (train, dev)
    assert all(not text.count("\t") for text in loaded.train.text)
