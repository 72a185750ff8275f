"""TFDS folders of array_record files, written by TFDS, in an interpreter without TensorFlow."""

import dataclasses
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dsee_jax.config import DataConfig
from dsee_jax.data import tfds as source
from dsee_jax.errors import InputError


def prepare(folder, name, config, features, splits, file_format="array_record"):
    """Write a dataset ``name/config`` with `download_and_prepare`."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        code_path = None  # TFDS looks for download checksums beside the builder's file, which do not exist.
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version="2.0.0", description="tiny")]  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    Tiny.name = name
    Tiny(data_dir=folder, config=config, file_format=file_format).download_and_prepare()


def rows_by_text(examples):
    """Return the rows sorted by text, because TFDS shuffles them."""
    return sorted(
        zip(examples.text, examples.pair or [None] * len(examples.text), examples.labels.tolist(), strict=True)
    )


def test_sst2_is_read(tmp_path):
    features = {
        "sentence": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["negative", "positive"]),
        "idx": np.int32,
    }
    train = [
        {"sentence": text, "label": label, "idx": 0}
        for text, label in (("good \u00e9t\u00e9", 1), ("bad", 0), ("ok", 1))
    ]
    prepare(tmp_path, "glue", "sst2", features, {"train": train, "validation": train[:2]})
    task = source.load(DataConfig(source="tfds", task="glue/sst2", dir=str(tmp_path)))
    assert (task.name, task.labels, task.glue) == ("sst2", ("negative", "positive"), "sst2")
    others = source.load(
        DataConfig(source="tfds", task="glue/sst2", dir=str(tmp_path), labels=("positive", "negative"))
    )
    assert (others.name, others.glue) == ("sst2", "")
    assert rows_by_text(task.train) == [("bad", None, 0), ("good \u00e9t\u00e9", None, 1), ("ok", None, 1)]
    assert len(task.dev["dev"].labels) == 2
    assert "tensorflow" not in sys.modules


def test_glue_mnli_has_two_dev_sets(tmp_path):
    names = ["entailment", "neutral", "contradiction"]
    features = {
        "premise": tfds.features.Text(),
        "hypothesis": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=names),
        "idx": np.int32,
    }
    row = {"premise": "He ran.", "hypothesis": "He sat.", "label": "contradiction", "idx": 0}
    prepare(
        tmp_path,
        "glue",
        "mnli",
        features,
        {split: [row] for split in ("train", "validation_matched", "validation_mismatched")},
    )
    task = source.load(DataConfig(source="tfds", task="glue/mnli", dir=str(tmp_path)))
    assert set(task.dev) == {"dev_matched", "dev_mismatched"}
    assert rows_by_text(task.train) == [("He ran.", "He sat.", 2)]


def test_float_label_of_an_own_builder_is_a_regression(tmp_path):
    """The code of the dataset is not installed; its folder is enough."""
    features = {"a": tfds.features.Text(), "b": tfds.features.Text(), "score": np.float32}
    rows = [{"a": "x", "b": "y", "score": 1.5}, {"a": "z", "b": "w", "score": 0.25}]
    prepare(tmp_path, "tiny_pairs", "one", features, {"train": rows, "validation": rows})
    config = DataConfig(source="tfds", task="tiny_pairs/one", dir=str(tmp_path), text="a", pair="b", label="score")
    task = source.load(config)
    assert task.regression
    assert rows_by_text(task.train) == [("x", "y", 1.5), ("z", "w", 0.25)]
    with pytest.raises(InputError, match=r"data\.label: .* no column 'scor' \(did you mean 'score'\?\)"):
        source.load(DataConfig(source="tfds", task="tiny_pairs/one", dir=str(tmp_path), text="a", label="scor"))


def test_unlabelled_row_is_named(tmp_path):
    """TFDS writes -1 where GLUE has no label."""
    features = {"sentence": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["negative", "positive"])}
    rows = [{"sentence": "a", "label": -1}]
    prepare(tmp_path, "glue", "sst2", features, {"train": rows, "validation": rows})
    with pytest.raises(InputError, match=r"glue/sst2 validation\[0\]: label '-1' is outside the task"):
        source.load(DataConfig(source="tfds", task="glue/sst2", dir=str(tmp_path)))


def test_wrong_column_format_or_split_is_named(tmp_path):
    """A text column without text, files without random access, and a missing split."""
    features = {"sentence1": tfds.features.Text(), "number": np.int32, "label": np.int64}
    rows = [{"sentence1": "a", "number": 1, "label": 3}, {"sentence1": "b", "number": 2, "label": 10}]
    prepare(tmp_path, "tiny_texts", "one", features, {"train": rows, "validation": rows})
    config = DataConfig(source="tfds", task="tiny_texts/one", dir=str(tmp_path))
    task = source.load(config)
    assert task.labels == ("3", "10")
    assert rows_by_text(task.train) == [("a", None, 0), ("b", None, 1)]
    with pytest.raises(InputError, match=r"\[0\]: 'number' is no text"):
        source.load(dataclasses.replace(config, text="number"))
    (info,) = tmp_path.rglob("dataset_info.json")
    content = info.read_text()
    info.write_text(content.replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"tfrecord files; prepare the data with file_format='array_record'"):
        source.load(config)
    info.write_text(content.replace('"name": "validation"', '"name": "other"'))
    with pytest.raises(InputError, match=r"no split validation; it has train, other"):
        source.load(config)


def test_unprepared_or_unknown_builder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"'glue/rte' is not prepared in .*array_record"):
        source.load(DataConfig(source="tfds", task="glue/rte", dir=str(tmp_path)))
    with pytest.raises(InputError, match=r"no TFDS builder 'no_such_set'"):
        source.load(DataConfig(source="tfds", task="no_such_set", dir=str(tmp_path)))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def say(key, value):
    def edit(folder):
        (path,) = folder.rglob("dataset_info.json")
        path.write_text(re.sub(rf'("{key}": )(\[[^]]*\]|"[^"]*")', rf"\g<1>{value}", path.read_text(), count=1))

    return edit


def train(work):
    return lambda folder: work(next(folder.rglob("*-train.array_record-*")))


def features(change):
    def edit(folder):
        (path,) = folder.rglob("features.json")
        path.write_text(change(path.read_text()))

    return edit


DAMAGE = {
    "a cut file": (train(lambda path: path.write_bytes(path.read_bytes()[:-70])), "array_record file|records"),
    "an empty file": (train(lambda path: path.write_bytes(b"")), "array_record file|records"),
    "a missing file": (train(lambda path: path.unlink()), "No such file"),
    "a folder": (train(lambda path: (path.unlink(), path.mkdir())), "is a folder"),
    "a flipped byte": (train(flip), "damaged records|array_record file|has 0 records"),
    "fewer records": (say("shardLengths", '["-5"]'), "has 3 records, and dataset_info.json says -5|no TFDS builder"),
    "no records": (say("shardLengths", '["0"]'), "says 0|no TFDS builder|is not prepared"),
    "more records": (say("shardLengths", '["1000000000"]'), "has 3 records, and dataset_info.json says 1000000000"),
    "other shards": (say("shardLengths", '["1", "2"]'), "No such file"),
    "no info": (lambda folder: next(folder.rglob("dataset_info.json")).write_text("{"), "no TFDS builder|not prepared"),
    "a version": (say("version", '"x"'), "no TFDS builder|not prepared"),
    "another module": (
        features(lambda text: text.replace("tensorflow_datasets.core.features.text_feature", "evil")),
        "features.json: the feature 'evil.Text' is no class of",
    ),
    "no features": (features(lambda text: "[]"), "features.json holds a list"),
    "another feature": (features(lambda text: text.replace("text_feature.Text", "x.Y")), "no TFDS builder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folder_is_one_line_and_runs_no_code(tmp_path, monkeypatch, name):
    damage, message = DAMAGE[name]
    columns = {"sentence1": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["no", "yes"])}
    rows = [{"sentence1": f"text {number}", "label": number % 2} for number in range(3)]
    prepare(tmp_path / "data", "tiny_texts", "one", columns, {"train": rows, "validation": rows})
    (tmp_path / "evil.py").write_text("raise SystemExit('the module of an input was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    damage(tmp_path / "data")
    with pytest.raises(InputError, match=message) as caught:
        source.load(DataConfig(source="tfds", task="tiny_texts/one", dir=str(tmp_path / "data")))
    assert "\n" not in str(caught.value)
    assert "evil" not in sys.modules


@pytest.mark.parametrize("task", ["huggingface:x", "kaggle:x/y", "../x", "x/..", "glue/sst2/a=b", "x y", ""])
def test_name_of_another_site_is_refused(tmp_path, task):
    with pytest.raises(InputError, match=r"is no TFDS builder; expected a name such as 'glue/sst2'"):
        source.load(DataConfig(source="tfds", task=task, dir=str(tmp_path)))
