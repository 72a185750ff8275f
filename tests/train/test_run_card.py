"""The model card of a run: the hub's figures, names as text, nothing of the machine; and its upload."""

import re
import shutil

import pytest
import yaml

import hub
import runs
from dsee_jax.__main__ import main
from dsee_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from dsee_jax.export import run as exports
from dsee_jax.train import run_card

RESULTS = {
    "task": "cola",
    "seed": 3,
    "before": {"matthews": 0.0, "loss": 0.7},
    "stages": [{"name": "tune", "metrics": {"matthews": 0.5123456789, "loss": None}}],
    "final": {"matthews": 0.5123456789, "loss": None},
    **runs.COSTS,
}


def config(path: str = "org/base") -> Config:
    data = DataConfig(source="glue", task="cola", dir="/home/me/glue")
    return Config(model=ModelConfig(path=path), data=data, train=TrainConfig(seed=3), output_dir="/home/me/run")


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_card_has_the_figures_of_the_hub():
    """A metric that is not finite is left out."""
    found = front(run_card.render(config(), RESULTS, name="mine", classes=2, form="hf"))
    (result,) = found["model-index"][0]["results"]
    assert found["model-index"][0]["name"] == "mine"
    assert (found["base_model"], found["library_name"], found["pipeline_tag"]) == (
        *(["org/base"], "transformers", "text-classification"),
    )
    assert result["dataset"] == {"name": "cola", "type": "glue", "config": "cola", "split": "validation"}
    assert result["metrics"] == [{"type": "matthews_correlation", "value": 0.512346, "name": "matthews"}]


@pytest.mark.parametrize("form", ["model", "hf", "compact", "peft", "stablehlo"])
def test_card_says_how_each_form_is_opened(form):
    text = run_card.render(config(), RESULTS, name="mine", classes=2, form=form)
    opens = {"hf": "transformers", "peft": "AutoPeftModelForSequenceClassification", "stablehlo": "run.py"}
    assert opens.get(form, 'load_pretrained("FOLDER", task="sequence-classification", num_labels=2)') in text
    for block in re.findall("```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")


def test_card_names_no_folder_of_this_machine():
    text = run_card.render(config("/home/me/bases/bert"), RESULTS, name="mine", classes=2, form="model")
    assert "/home" not in text
    assert "`bert` tuned on `cola`" in text
    assert "base_model" not in front(text)
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == {
        "data.source": "glue",
        "data.task": "cola",
        "train.seed": 3,
    }


def test_names_on_a_card_are_text():
    hostile = "a|b`c\n---\n# e\n<b onclick=x>\x1b[1m [f](g)"
    text = run_card.render(config(hostile), RESULTS | {"task": hostile}, name=hostile, classes=2, form="hf")
    assert not re.findall(r"^(---|# e|<b)", text.split("---\n", 2)[2], re.MULTILINE)
    assert "\x1b" not in text
    assert front(text)["model-index"][0]["results"][0]["dataset"]["name"].startswith("a|b`c\\n---")


def test_model_and_upload_of_a_run_have_a_card(finished_run, tmp_path, capsys, monkeypatch):
    run = finished_run("dsee") / "run"
    assert front((run / "model" / "README.md").read_text())["library_name"] == "dsee_jax"
    with hub.opened(monkeypatch) as server:
        assert main(["export", str(run), str(tmp_path / "out"), "--format", "hf", "--push", "team/model"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n{server.url}/team/model\n"
    files = server.files["team/model"]
    assert files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    metrics = front(files["README.md"].decode())["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["accuracy", "loss"]


def test_export_is_kept_where_the_hub_refuses_it(finished_run, tmp_path, capsys, monkeypatch):
    def copy(run, out, **options):
        shutil.copytree(f"{run}/adapter", out)

    monkeypatch.setattr(exports, "export_run", copy)
    run, out = finished_run("dsee") / "run", tmp_path / "out"
    with hub.opened(monkeypatch) as server:
        server.refuses["other/model"] = 403
        assert main(["export", str(run), str(out), "--push", "other/model"]) == 2
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert said.err.count("\n") == 1
    assert "other/model: 403 You don't have the rights" in said.err
    assert (out / "adapter.safetensors").exists()


def test_name_that_is_no_repository_exports_nothing(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--push", "a/b/c"]) == 2
    assert "--push a/b/c: Repo id must be" in capsys.readouterr().err
