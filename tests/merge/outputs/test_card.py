"""The model card and the recipe beside a merged model."""

import re

import yaml

from dsee_jax.runtime import strict_yaml
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


def test_line_break_in_a_name_ends_no_comment():
    """The name of a file, or of a folder, may hold any character."""
    digests = {f"a{mark}merge_method: x/{number}": "00" for number, mark in enumerate("\n\r\x85\u2028\u2029\0é")}
    text = card.recipe_text({"merge_method": "linear"}, digests)
    assert yaml.safe_load(text) == {"merge_method": "linear"}
    assert "aémerge_method: x/6" in text


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


HOSTILE = "a|b`c``d\n---\n# e\n\x1b[1m<b onclick=x>\u202e [f](g) *h* _i_ \ud800"


def test_names_in_a_card_are_text(tmp_path):
    """Each name stays in its cell, code span or heading; the recipe stays in its block."""
    text = card.card(
        HOSTILE,
        method="ties",
        about="about",
        models=[HOSTILE],
        base=HOSTILE,
        recipe=f"# {HOSTILE}\n```\nmerge_method: ties\n````\n",
        options={HOSTILE: HOSTILE},
        digests={HOSTILE: "ff" * 32},
    )
    assert not {"\x1b", "\u202e", "\ud800"} & set(text)
    lines = text.splitlines()
    code = r"```a|b`c``d\n---\n# e\n\x1b[1m<b onclick=x>\u202e [f](g) *h* _i_ \ud800```"
    assert r"# a\|b\`c\`\`d\\n---\\n\# e\\n\\x1b\[1m\<b onclick=x\>\\u202e \[f\](g) \*h\* \_i\_ \\ud800" in lines
    assert {f"- {code} (the base)", f"- {code}", f"- {code}: {code}"} <= set(lines)
    row = next(line for line in lines if "ffff" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert [lines.count(fence) for fence in ("`````yaml", "`````")] == [1, 1]


def test_written_recipe_reads_as_the_recipe():
    """Names of inputs add no line; equal values that are one object are written in full, without aliases."""
    shared = {"filter": "mlp", "value": 0.5}
    recipe = {
        "models": [shared, shared],
        "no": {"1": "on", "é\u2028\x85": "\x07: # ["},
        "x" * 300: ["~", "=", "<<", " a"],
    }
    text = card.recipe_text(recipe, {"a\nmerge_method: x\x85b": "00"})
    assert strict_yaml.parse("recipe", text).content == recipe
    assert "&id" not in text
    assert text.startswith(card.HEADER)
