"""Configs: every file parses, round trips, and what cannot work is one line that names the key."""

import pathlib

import pytest

from dsee_jax import config
from dsee_jax.errors import InputError
from dsee_jax.train import config_file

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_parses_and_says_its_command(path):
    config_file.read(path)
    assert "python train.py" in path.read_text().split("\nmodel:")[0]


def test_round_trip(tmp_path):
    settings = config_file.read(None, ["--delta.targets=[a/.*, b]", "--train.learning_rate=5e-4", "output_dir=x"])
    assert settings.delta.targets == ("a/.*", "b")
    assert settings.train.learning_rate == 5e-4
    (tmp_path / "c.yaml").write_text(config_file.dump(settings))
    assert config_file.read(tmp_path / "c.yaml") == settings


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("delta: {rank: 4, alpha: 8}\n")
    settings = config_file.read(tmp_path / "c.yaml", ["--delta.rank=2"])
    assert (settings.delta.rank, settings.delta.alpha, settings.delta.scale) == (2, 8.0, 4.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--delta.rnk=4", r"unknown key 'delta.rnk'.*did you mean 'rank'"),
        ("--detla.rank=4", r"unknown key 'detla'.*did you mean 'delta'"),
        ("--delta=4", "'delta' is a section"),
        ("--delta.rank=many", "delta.rank"),
        ("--delta.rank=-1", "delta.rank is -1"),
        ("--prune.kind=magic", "prune.kind"),
        ("--prune.sparsity=1.0", r"prune.sparsity is 1.0; expected a fraction of zeros in \[0, 1\)"),
        ("--prune.sparsity=-0.1", "prune.sparsity is -0.1"),
        ("--prune.search=0", "prune.search is 0"),
        ("--prune.tolerance=1.5", r"prune.tolerance is 1.5; expected a fraction in \[0, 1\]"),
        ("--prune.kind=earlybert", "prune.heads is 0; expected more than 0"),
        ("--prune.heads=1.0", r"prune.heads is 1.0; expected a fraction in \[0, 1\) or a whole number"),
        ("--prune.neurons=-2", "prune.neurons is -2"),
        ("--prune.neurons=many", "prune.neurons|Could not decode"),
        ("--train.full=true", "set delta.rank and delta.nonzeros to 0"),
        ("--train.warmup=1", "train.warmup"),
        ("seed", "write --section.key=value"),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(InputError, match=message) as caught:
        config_file.read(None, [override])
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match="none.yaml: cannot read"):
        config_file.read(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(InputError, match="expected sections"):
        config_file.read(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="not YAML"):
        config_file.read(tmp_path / "broken.yaml")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 10_000)
    with pytest.raises(InputError, match="deep.yaml: nested too deep"):
        config_file.read(tmp_path / "deep.yaml")


def test_help_describes_every_key():
    text = config_file.describe()
    for section in ("model", "data", "delta", "prune", "train", "mesh"):
        docs = config_file._docs(type(getattr(config.Config(), section)))
        for field in getattr(config.Config(), section).__dataclass_fields__:
            assert f"  {section}.{field} = " in text
            assert docs.get(field) or section == "mesh", f"{section}.{field} has no description"
