"""Configs: every file parses and round-trips, and a value that cannot work is one line that names its key."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any, get_args

import numpy as np
import pytest

from dsee_jax import config
from dsee_jax.errors import InputError
from dsee_jax.train import config_file

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_parses_and_names_its_command(path):
    config_file.read(path)
    assert "python train.py" in path.read_text().split("\nmodel:")[0]


def test_round_trip(tmp_path):
    settings = config_file.read(None, ["--delta.targets=[a/.*, b]", "--train.learning_rate=5e-4", "output_dir=x"])
    assert settings.delta.targets == ("a/.*", "b")
    assert settings.train.learning_rate == 5e-4
    (tmp_path / "c.yaml").write_text(config_file.dump(settings))
    assert config_file.read(tmp_path / "c.yaml") == settings


def test_dump_repeats_equal_lists_in_full():
    """YAML would write the second of two identical tuples as a reference to the first."""
    targets = ("a/.*",)
    text = config_file.dump(
        config.Config(delta=config.DeltaConfig(targets=targets), prune=config.PruneConfig(targets=targets))
    )
    assert text.count("  targets:\n  - a/.*\n") == 2


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("delta: {rank: 4, alpha: 8}\n")
    settings = config_file.read(tmp_path / "c.yaml", ["--delta.rank=2"])
    assert (settings.delta.rank, settings.delta.alpha, settings.delta.scale) == (2, 8.0, 4.0)


@pytest.mark.parametrize(
    ("override", "section", "name", "expected"),
    [
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("train.learning_rate=1", "train", "learning_rate", 1.0),
        ("delta.rank='4'", "delta", "rank", 4),
        ("prune.heads=2", "prune", "heads", 2),
        ("prune.heads=1e-1", "prune", "heads", 0.1),
        ("data.packing='false'", "data", "packing", False),
        ("data.dir=", "data", "dir", ""),
        ("data.task=2024", "data", "task", "2024"),
        ("data.labels=[0, 1]", "data", "labels", ("0", "1")),
    ],
)
def test_yaml_value_takes_the_type_of_its_field(override, section, name, expected):
    value = getattr(getattr(config_file.read(None, [override]), section), name)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--delta.rnk=4", r"unknown key 'delta.rnk'.*did you mean 'rank'"),
        ("--detla.rank=4", r"unknown key 'detla'.*did you mean 'delta'"),
        ("--delta=4", "'delta' is a section"),
        ("--delta.rank=many", "delta.rank is 'many'; expected a whole number"),
        ("--delta.rank=-1", "delta.rank is -1"),
        ("--delta.rank=", "delta.rank is blank; expected a whole number"),
        ("--prune.sparsity=1.0", r"prune.sparsity is 1.0; expected a fraction of zeros in \[0, 1\)"),
        ("--prune.sparsity=-0.1", "prune.sparsity is -0.1"),
        ("--prune.search=0", "prune.search is 0"),
        ("--prune.tolerance=1.5", r"prune.tolerance is 1.5; expected a fraction in \[0, 1\]"),
        ("--prune.kind=earlybert", "prune.heads is 0; expected more than 0"),
        ("--prune.heads=1.0", r"prune.heads is 1.0; expected a fraction in \[0, 1\) or a whole number"),
        ("--prune.neurons=-2", "prune.neurons is -2"),
        ("--prune.neurons=many", "prune.neurons is 'many'; expected a number"),
        (
            "--prune.calibrate=layerwise",
            "prune.score is 'WABS'; expected one of WANDA, RIA, SPARSEGPT for prune.calibr",
        ),
        ("--prune.score=RIAA", "one of W, WAB, .*did you mean 'RIA'"),
        (
            "--prune.layers=1.0",
            r"prune.layers is 1.0; expected a fraction in \[0, 1\) or a whole number: 1.0 leaves none",
        ),
        ("--prune.hidden=-1", "prune.hidden is -1"),
        ("--prune.uniform=true", "prune.uniform is True; expected false for unstructured, which prunes no heads"),
        ("--train.full=true", "set delta.rank and delta.nonzeros to 0"),
        ("--train.warmup=1", "train.warmup"),
        ("--prune.target.layers=true", "prune.target.layers is True; expected false: no prune.target is set"),
        (
            "--train.eval_every=1.5",
            r"train.eval_every is 1.5; expected 0 or more steps, or a fraction",
        ),
        ("--train.most_steps=-1", r"train.most_steps is -1; expected 0 \(no limit\), or train.least_steps or more"),
        ("--train.most_steps=1", r"train.most_steps is 1; expected 0 \(no limit\), or 2 or more: two stages train"),
        (
            "--train.distill.wieght=1",
            "unknown key 'train.distill.wieght' in section 'train.distill' .did you mean 'weight'",
        ),
        ("--train.distill.weight=2", "train.distill.weight is 2.0; expected 0 .no distillation. to 1"),
        ("--train.distill.temperature=0", "train.distill.temperature is 0.0; expected more than 0"),
        ("--train.distill=1", "'train.distill' is a section of keys, found 1"),
        ("--mesh.fsdp=-1", "mesh.data and mesh.fsdp are -1; only one"),
        ("seed", "write --section.key=value"),
    ],
)
def test_bad_value_is_named(override, message):
    with pytest.raises(InputError, match=message) as caught:
        config_file.read(None, [override])
    assert "\n" not in str(caught.value)


def sections(kind: Any, prefix: str = "") -> dict[str, Any]:
    """The sections of a config by their dotted names."""
    own = {
        prefix + field.name: field.type for field in dataclasses.fields(kind) if dataclasses.is_dataclass(field.type)
    }
    return own | {name: each for key, value in own.items() for name, each in sections(value, f"{key}.").items()}


SECTIONS = sections(config.Config)
KEYS = [
    (section, field)
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
    if not dataclasses.is_dataclass(field.type)
]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("delta.support", "gresbmo", "one of grebsmo, magnitude, random (did you mean 'grebsmo'?)"),
        ("delta.rank", 1.5, "a whole number"),
        ("delta.rank", True, "a whole number"),
        ("delta.budget", 1.0, "a share in [0, 1), 0 for the rank of delta.rank"),
        ("delta.alpha", False, "a number"),
        ("delta.targets", "one string", "a list of strings"),
        ("delta.scale_sparse", 1, "true or false"),
        ("prune.kind", "x", "one of none, unstructured, nm, structured, earlybert"),
        ("prune.n", 5, "1 to prune.m = 4"),
        ("prune.heads", True, "a number"),
        ("model.path", ["a"], "a string"),
        ("model.dtype", "float16", "one of float32, bfloat16 (did you mean 'bfloat16'?)"),
        ("data.examples", -1, "0 (all) or more"),
        ("train.batch_size", 0, "1 to 1048576"),
        ("generate.beams", 0, "1 or more"),
        ("train.rates.b", 0.0, "a factor of the learning rate, more than 0"),
        ("train.distill.top_k", -1, "0 (all tokens) or more"),
        ("train.distill.schedule", "x", "one of constant, linear"),
        ("mesh.data", 0, "a number of devices, or -1 for all that are left"),
    ],
)
def test_section_refuses_a_bad_value_in_python_as_in_yaml(key, value, expected):
    section, _, name = key.rpartition(".")
    message = f"{key} is {value!r}; expected {expected}"
    with pytest.raises(InputError) as caught:
        SECTIONS[section](**{name: value})
    assert str(caught.value) == message
    with pytest.raises(InputError) as caught:
        config_file.read(None, [f"{key}={json.dumps(value)}"])
    assert str(caught.value) == message


NUMBERS = [f"{section}.{field.name}" for section, field in KEYS if field.type is float or float in get_args(field.type)]


@pytest.mark.parametrize("value", [".nan", "nan", ".inf", "-inf", "1" + "0" * 400])
def test_number_that_is_not_finite_is_refused(value):
    """For every key that takes a fraction."""
    assert "delta.alpha" in NUMBERS
    for key in NUMBERS:
        with pytest.raises(InputError, match=f"{key} is .*; expected"):
            config_file.read(None, [f"--{key}={value}"])


def test_list_of_strings_becomes_a_tuple():
    assert config.DeltaConfig(targets=["a", "b"]) == config.DeltaConfig(targets=("a", "b"))
    with pytest.raises(InputError, match=r"data.labels is \(0, 1\); expected a list of strings"):
        config.DataConfig(labels=[0, 1])  # pyright: ignore[reportArgumentType]


def test_names_of_classes_of_a_regression_are_refused():
    with pytest.raises(
        InputError, match=r"data.labels is \('low', 'high'\); expected none: with data.regression a label is"
    ):
        config.DataConfig(labels=("low", "high"), regression=True)


@pytest.mark.parametrize("name", ["layers", "hidden"])
def test_search_for_layers_and_width_is_refused(name):
    with pytest.raises(
        InputError, match=f"prune.{name} is 2; expected 0 for earlybert, which searches for heads and neurons"
    ):
        config.PruneConfig(kind="earlybert", heads=1, **{name: 2})
    config.PruneConfig(kind="structured", **{name: 2})


@pytest.mark.parametrize("kind", ["structured", "earlybert"])
def test_calibration_layer_by_layer_is_refused_where_all_layers_are_cut_at_once(kind):
    with pytest.raises(InputError, match=f"prune.calibrate is 'layerwise'; expected one_shot for {kind}"):
        config.PruneConfig(kind=kind, heads=1, calibrate="layerwise")


@pytest.mark.parametrize("kind", ["structured", "earlybert"])
def test_uniform_pruning_compares_within_each_layer(kind):
    prune = config.PruneConfig(kind=kind, heads=1, uniform=True)
    assert prune.scope == "tensor"
    assert dataclasses.replace(prune) == prune


def test_whole_number_is_a_number():
    assert config.TrainConfig(epochs=1) == config.TrainConfig(epochs=1.0)


def test_config_refuses_sections_that_contradict_each_other():
    with pytest.raises(InputError, match="train.full trains every weight"):
        config.Config(train=config.TrainConfig(full=True))
    with pytest.raises(InputError, match=r"train.rates is 4; expected a RatesConfig"):
        config.TrainConfig(rates=4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="delta is 4; expected a DeltaConfig"):
        config.Config(delta=4)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["delta.rank=0", "delta.budget=0.1"], "delta.rank is 0; expected more than 0: delta.budget chooses the rank"),
        (["delta.start=x", "delta.budget=0.1"], "delta.budget is 0.1; expected 0: the adapter of delta.start"),
        (["delta.rank=0", "train.rates.b=16"], "train.rates.b is 16.0; expected 1.0: delta.rank is 0"),
        (["delta.nonzeros=0", "train.rates.values=2"], "train.rates.values is 2.0; expected 1.0: delta.nonzeros is 0"),
        (
            ["data.source=e2e", "train.rates.head=2"],
            "train.rates.head is 2.0; expected 1.0: causal-lm has no task head",
        ),
        (["delta.rank=0", "prune.score=ABS"], "prune.score is 'ABS', a score of the update alone, and delta.rank is 0"),
    ],
)
def test_rate_or_rank_of_values_that_are_not_trained_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        config_file.read(None, overrides)
    assert config_file.read(None, ["delta.rank=0", "delta.start=lora", "train.rates.b=16"]).train.rates.b == 16


LAUGHS = "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in itertools.pairwise("bcdefghijk"))
"""Each list holds the one before nine times."""


@pytest.mark.parametrize("content", [b"\xff\xfet\x00", b"train: {seed: \xe9}"])
def test_file_that_is_no_utf8_is_named(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"c.yaml: not UTF-8 text .byte \d+.; expected a config in YAML"):
        config_file.read(tmp_path / "c.yaml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs devices and pipes of Unix")
def test_device_pipe_or_folder_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (("/dev/zero", "a device"), (tmp_path / "pipe", "a pipe"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=f"is .*{message}"):
            config_file.read(path)


def test_byte_order_mark_blank_sections_and_aliases_are_read(tmp_path):
    text = "\ufefftrain:\ndelta: &d {rank: 4}\nprune: {<<: {}, targets: &t [x]}\ndata: {labels: *t}\n"
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    settings = config_file.read(tmp_path / "c.yaml", ["--train.seed=3"])
    assert (settings.train.seed, settings.delta.rank, settings.data.labels) == (3, 4, ("x",))


def test_null_device_is_an_empty_config():
    assert config_file.read(os.devnull) == config.Config()


def test_override_keeps_a_hash_sign():
    assert config_file.read(None, ["--output_dir=my runs/run #3"]).output_dir == "my runs/run #3"


@pytest.mark.parametrize(
    ("section", "name"),
    [(section, field.name) for section, field in KEYS],
)
def test_extreme_value_of_a_key_is_read_or_refused(section, name):
    for text in ("", "~", ".inf", "-.inf", ".nan", "-1", "1e300", "1" * 400, "!!int ''", "[]", "{}", "[[]]", "\ud800"):
        with contextlib.suppress(InputError):
            config_file.read(None, [f"--{section}.{name}={text}"])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seed_whose_bits_would_be_dropped_is_refused(seed):
    with pytest.raises(InputError, match=r"train.seed is .*; expected"):
        config_file.read(None, [f"--train.seed={seed}"])


def test_bad_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none.yaml: No such file"):
        config_file.read(tmp_path / "none.yaml")
    for name, text, message in (
        ("list", "- a\n", "expected sections"),
        ("broken", "a: [1\n", "not YAML"),
        ("deep", "a: " + "[" * 10_000, "nested deeper than 32 levels"),
        ("repeated", "train: {seed: 1}\ntrain: {seed: 2}\n", "line 2: the key 'train' is repeated with another value"),
        ("laughs", "a: &a [x, x]\nb: &b [*a, *a]\n" + LAUGHS, "line 8: more than 1,000,000 values, aliases expanded"),
        ("surrogate", 'output_dir: "\\ud800"\n', "a character that no file can hold|not YAML"),
        ("circle", "a: &a [*a]\n", "line 1: the alias \\*a refers to no value before it"),
        ("tag", "train: {seed: !!int ''}\n", "not YAML"),
        ("number", f"train: {{seed: {'9' * 5000}}}\n", "not YAML: .*a number of more than 400 characters"),
        ("large", "#" * 1_000_001, "larger than 1,000,000 bytes; expected a config in YAML"),
        ("type", "delta: {rank: many}\n", "delta.rank is 'many'; expected a whole number"),
        ("value", "delta: {rank: -1}\n", "delta.rank is -1; expected 0 or more"),
        ("key", "delta: {rnk: 1}\n", "unknown key 'delta.rnk'"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
        with pytest.raises(InputError, match=f"{name}.yaml: {message}"):
            config_file.read(tmp_path / f"{name}.yaml")


def test_every_key_is_described():
    text = config_file.describe()
    docs = {section: config_file._docs(kind) for section, kind in SECTIONS.items()}
    for section, field in KEYS:
        assert f"{section}.{field.name} = " in text
        assert docs[section].get(field.name), f"{section}.{field.name} has no description"


def test_numbers_of_numpy_and_paths_become_plain():
    delta: Any = {"rank": np.int64(4), "alpha": np.float32(8), "nonzeros": 3}
    output: Any = pathlib.Path("x")
    made = config.Config(delta=config.DeltaConfig(**delta), output_dir=output)
    assert (type(made.delta.rank), type(made.delta.alpha), made.output_dir) == (int, float, "x")
    assert "rank: 4\n" in config_file.dump(made)


def test_error_names_the_file_only_where_the_file_is_wrong(tmp_path):
    (tmp_path / "good.yaml").write_text("train: {seed: 1}")
    (tmp_path / "bad.yaml").write_text("train: {sed: 1}")
    with pytest.raises(InputError, match=r"^unknown key 'train.sed'"):
        config_file.read(tmp_path / "good.yaml", ["--train.sed=1"])
    with pytest.raises(InputError, match=r"bad.yaml: unknown key 'train.sed'"):
        config_file.read(tmp_path / "bad.yaml", ["--train.epochs=2"])


def test_override_without_a_value_is_named_before_the_file():
    with pytest.raises(InputError, match="'--train.seed' is not an override; write --section.key=value"):
        config_file.read("1", ["--train.seed"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"data.source": "glue", "model.task": "causal-lm"},
            "data.source 'glue', which is for sequence-classification",
        ),
        (
            {"data.source": "e2e", "model.task": "sequence-classification"},
            "'e2e', which is for causal-lm: set data.source",
        ),
        ({"data.source": "tfds", "data.multi_label": True}, "data.source is 'tfds'; expected csv or jsonl"),
        (
            {"data.source": "csv", "data.multi_label": True, "data.regression": True},
            "data.regression is True; expected false",
        ),
        (
            {"data.source": "csv", "data.multi_label": True, "model.task": "causal-lm"},
            "data.multi_label is True; expected",
        ),
        (
            {"data.source": "squad", "model.task": "token-classification"},
            "which is for question-answering: set data.source",
        ),
        (
            {"data.source": "squad", "data.stride": 128},
            "data.stride is 128; expected 0 .*, or less than data.max_length",
        ),
        ({"data.held_text": "x.txt"}, "data.held_text is 'x.txt'; expected none for sequence-classification"),
        ({"data.label_separator": " "}, "data.label_separator is ' '; expected some text"),
        (
            {"prune.score": "SPARSEGPT", "prune.scope": "output"},
            "prune.scope is 'output'; expected global or tensor for SPARSEGPT",
        ),
        (
            {"prune.score": "WANDA", "prune.calibrate": "layerwise"},
            "prune.scope is 'global'; expected tensor or output for prune.calibrate layerwise",
        ),
    ],
)
def test_config_refuses_keys_that_do_not_go_together(keys, message):
    with pytest.raises(InputError, match=message):
        config_file.read(None, [f"--{key}={json.dumps(value)}" for key, value in keys.items()])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prune.kind": "none"}, "prune.kind 'none', which has no stage retune to distil in"),
        ({"prune.kind": "earlybert", "prune.heads": 1}, "prune.kind 'earlybert', which has no stage retune"),
        ({"train.retune_epochs": 0}, "train.retune_epochs is 0: only the stage retune distils"),
        ({"train.distill.hidden": 1, "model.scan": True}, "set model.scan to false"),
    ],
)
def test_config_refuses_distillation_that_cannot_be(keys, message):
    keys = {"train.distill.weight": 0.5} | keys
    with pytest.raises(InputError, match=message):
        config_file.read(None, [f"--{key}={json.dumps(value)}" for key, value in keys.items()])


def test_nested_sections_come_back_from_their_yaml(tmp_path):
    chosen = config_file.read(None, ["--train.distill.weight=0.5", "--train.distill.schedule=linear"])
    assert chosen.train.distill == config.DistillConfig(weight=0.5, schedule="linear")
    (tmp_path / "c.yaml").write_text(config_file.dump(chosen))
    assert config_file.read(tmp_path / "c.yaml") == chosen
    assert config_file.flat(chosen)["train.distill.weight"] == 0.5


def test_default_of_an_earlier_version_is_the_same_config():
    """The folder of a run holds the number of draws that was its default."""
    assert config.PruneConfig(schedule_updates=10) == config.PruneConfig()
    assert config.PruneConfig(schedule="interleaved", schedule_updates=10).schedule_updates == 10
