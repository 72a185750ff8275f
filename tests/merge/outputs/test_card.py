"""The model card and the recipe beside a merged model."""

import yaml

from merge.outputs import card

DIGESTS = {"org/b/model.safetensors": "ff" * 32, "a/config.json": "00" * 32}


def test_recipe_text_is_the_recipe_with_digests():
    """The digests are a comment in the format of sha256sum; the order of the recipe is kept."""
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "org/b", "parameters": {"weight": 0.5}}],
        "dtype": "float32",
    }
    text = card.recipe_text(recipe, DIGESTS)
    assert yaml.safe_load(text) == recipe
    assert list(yaml.safe_load(text)) == list(recipe)
    assert text.splitlines()[1:3] == [f"# {'00' * 32}  a/config.json", f"# {'ff' * 32}  org/b/model.safetensors"]


def test_card_describes_the_merge(tmp_path, monkeypatch):
    """base_model lists hub ids only: no folders, revisions or separators of adapters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "folder").mkdir(parents=True)
    text = card.card(
        "mine",
        method="ties",
        about="trimmed, by elected sign (Yadav et al. 2023, arXiv 2306.01708)",
        models=["org/b@v2+org/lora", "/data/models/c", "here/folder", "./d"],
        base="org/base",
        recipe="merge_method: ties\n\n",
        options={"density": 0.2, "normalize": True},
        digests=DIGESTS,
    )
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["org/base", "org/b", "org/lora"],
        "library_name": "transformers",
        "tags": ["merge", "ties"],
    }
    for part in (
        "# mine\n",
        "**ties**: trimmed, by elected sign (Yadav et al. 2023, [arXiv 2306.01708](https://arxiv.org/abs/2306.01708)).",
        "- `org/base` (the base)\n- `org/b@v2+org/lora`\n- `/data/models/c`\n",
        "- `density`: `0.2`\n- `normalize`: `True`\n",
        "```yaml\nmerge_method: ties\n```",
        f"| `a/config.json` | `{'00' * 32}` |",
    ):
        assert part in body


def test_card_without_base_options_or_ids():
    text = card.card(
        "mine", method="linear", about="mean", models=["a"], base=None, recipe="", options={}, digests=DIGESTS
    )
    assert yaml.safe_load(text.split("---\n")[1]) == {"library_name": "transformers", "tags": ["merge", "linear"]}
    assert "(the base)" not in text
    assert "## Options\n\nNone.\n" in text
