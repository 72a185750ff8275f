"""A folder is replaced only if its command, or a command like it, wrote everything in it."""

import pytest

import tiny
from dsee_jax.ckpt import hf, hf_save
from dsee_jax.errors import InputError
from dsee_jax.runtime import earlier_output

MARKER = ("recipe.yml", "# made by")


def test_absent_empty_and_own_folders_pass(tmp_path):
    out = tmp_path / "out"
    earlier_output.check(out, ["a*"], marker=MARKER)
    out.mkdir()
    earlier_output.check(out, ["a*"], marker=MARKER)
    for name in ("a1", "a2", ".DS_Store"):
        (out / name).write_text("x")
    (out / "recipe.yml").write_text("# made by a command\n")
    (out / "sub" / "two").mkdir(parents=True)
    (out / "sub" / "two" / "x.json").write_text("x")
    earlier_output.check(out, ["a*", "recipe.yml", "sub/two/x.*"], marker=MARKER)


@pytest.mark.parametrize("other", ["notes.txt", "sub/", "sub/a1", "sub/x/", "sub/two/notes", ".git/", "a1/"])
def test_other_files_and_subfolders_are_named(tmp_path, other):
    (tmp_path / "recipe.yml").write_text("# made by a command\n")
    (tmp_path / other).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / other).mkdir() if other.endswith("/") else (tmp_path / other).write_text("x")
    names = ["a*", "recipe.yml", "sub"] + (["sub/two/x.json"] if other not in ("sub/", "sub/a1") else [])
    named = other.strip("/") if "sub/two/x.json" in names else other.partition("/")[0]
    with pytest.raises(InputError, match=f"{tmp_path} is not replaced: '{named}' in it is not a file"):
        earlier_output.check(tmp_path, names, marker=MARKER)


@pytest.mark.parametrize("content", [None, "# made", "merge_method: linear\n"])
def test_folder_without_the_marker_is_not_replaced(tmp_path, content):
    (tmp_path / "a1").write_text("x")
    if content is not None:
        (tmp_path / "recipe.yml").write_text(content)
    with pytest.raises(InputError, match=r"has no recipe.yml of an earlier output"):
        earlier_output.check(tmp_path, ["a*", "recipe.yml"], marker=MARKER)


def test_file_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match="out is a file"):
        earlier_output.check(tmp_path / "out", ["out"])


def test_saved_model_does_not_replace_a_folder_with_other_files(tmp_path):
    model, params = hf.load_pretrained(base := tiny.bert(tmp_path / "base"))
    hf_save.save_pretrained(tmp_path / "out", model, params, source=base)
    hf_save.save_pretrained(tmp_path / "out", model, params, source=base, overwrite=True)
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="'thesis.tex' in it"):
        hf_save.save_pretrained(tmp_path / "out", model, params, source=base, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()
