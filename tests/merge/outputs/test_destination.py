"""The output folder of a merge: checked before any work, and replaced only where a merge wrote everything in it."""

import os
import subprocess
import sys
import time

import pytest

import checkpoints
import hub
from merge import __main__ as command
from merge.outputs import destination
from merge.streaming import engine

CASES = {}


def case(*words):
    """Register a function that prepares a folder and returns the argument OUT_DIR, and the words of the error."""

    def add(function):
        CASES[function.__name__] = (function, words)
        return function

    return add


def merged(folder, name="out"):
    """Write the output of a merge."""
    assert command.main([str(folder / "recipe.yml"), str(folder / name)]) == 0
    return folder / name


@case("is not replaced", "'thesis.tex'")
def folder_of_other_files(folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("x")
    return folder / "out"


@case("is not replaced", "has no merge_recipe.yml")
def model_that_no_merge_wrote(folder):
    checkpoints.save(folder / "out", checkpoints.load(folder / "base"))
    return folder / "out"


@case("is not replaced", "'notes.txt'")
def merge_with_a_file_of_the_user(folder):
    (merged(folder) / "notes.txt").write_text("x")
    return folder / "out"


@case("is not replaced", "'model'")
def merge_with_a_folder_of_the_user(folder):
    (merged(folder) / "model").mkdir()
    return folder / "out"


@case("holds the input", "recipe.yml")
def folder_of_the_recipe(folder):
    return folder


@case("holds the input", "merge_recipe.yml")
def merge_that_is_the_recipe(folder):
    merged(folder).rename(folder / "out")
    (folder / "recipe.yml").rename(folder / "out" / "merge_recipe.yml")
    (folder / "recipe.yml").symlink_to("out/merge_recipe.yml")
    return folder / "out"


@case("holds the input", "model_0")
def folder_of_an_input(folder):
    return folder / "model_0"


@case("is or holds the working folder")
def empty_working_folder(folder):
    return "."


@case("is or holds the working folder")
def parent_of_the_working_folder(folder):
    return ".."


@case("is or holds your home folder")
def home_folder(folder):
    return "~"


@case("is a file")
def file(folder):
    (folder / "out").write_text("x")
    return folder / "out"


@case("file is a file")
def folder_in_a_file(folder):
    (folder / "file").write_text("x")
    return folder / "file" / "out"


@case("embedded null byte")
def null_byte(folder):
    return f"{folder}/a\0b"


@case("does not exist", "create it first")
def folder_in_no_folder(folder):
    return folder / "none" / "out"


@case("does not exist", "create it first")
def link_into_no_folder(folder):
    (folder / "out").symlink_to(folder / "none" / "out")
    return folder / "out"


@case("is a loop of symbolic links")
def loop_of_links(folder):
    (folder / "out").symlink_to("out")
    return folder / "out"


@case("File name too long")
def long_name(folder):
    return folder / ("x" * 250)


@case("File name too long")
def long_path(folder):
    return folder.joinpath(*["y" * 200] * 30)


@case("no-such-user")
def home_of_nobody(folder):
    return "~no-such-user/out"


@case("OUT_DIR is empty")
def empty_text(folder):
    return ""


@case("is a whole bucket")
def bucket(folder):
    return "s3://bucket"


@case(".out.partial", "in the way")
def unfinished_output_is_a_file(folder):
    (folder / ".out.partial").write_text("x")
    return folder / "out"


@case(".out.partial", "in the way")
def unfinished_output_is_a_link(folder):
    (folder / ".out.partial").symlink_to(folder / "base")
    return folder / "out"


@case(".out.partial is not replaced", "'thesis.tex'")
def unfinished_output_has_other_files(folder):
    (folder / ".out.partial").mkdir()
    (folder / ".out.partial" / "thesis.tex").write_text("x")
    return folder / "out"


def tree(folder):
    """``{path: bytes, link or None for a folder}`` of everything below a folder."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", CASES)
def test_folder_that_is_not_a_merge_s_is_kept(tmp_path, tmp_path_factory, capsys, monkeypatch, name):
    """With --overwrite; one line, before any tensor is read, and not one file is changed."""
    prepare, words = CASES[name]
    checkpoints.family(tmp_path)
    checkpoints.recipe(tmp_path, each={"weight": 0.5})
    here, home = tmp_path_factory.mktemp("work") / "here", tmp_path_factory.mktemp("home")
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    out = prepare(tmp_path)
    monkeypatch.chdir(here)
    monkeypatch.setattr(engine, "run", None)
    before = tree(tmp_path)
    capsys.readouterr()
    assert command.main([str(tmp_path / "recipe.yml"), str(out), "--overwrite"]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert all(word in line for word in words), line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("exists", [True, False])
def test_link_stays_a_link_to_the_output(tmp_path, exists):
    """To an empty folder on another disk, for instance, or to a folder that does not exist yet."""
    checkpoints.family(tmp_path)
    path = checkpoints.recipe(tmp_path, each={"weight": 0.5})
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "big").mkdir()
    (tmp_path / "out").symlink_to("disk/big")
    for options in ([], ["--overwrite"]):
        assert command.main([str(path), str(tmp_path / "out"), *options]) == 0
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "big" / "model.safetensors").is_file()


def test_file_that_appears_during_the_merge_is_kept(tmp_path, capsys, monkeypatch):
    """The finished merge waits in its hidden folder, and the same command completes it without merging again."""
    checkpoints.family(tmp_path)
    path, out = checkpoints.recipe(tmp_path, each={"weight": 0.5}), tmp_path / "out"
    work = engine._merge

    def slow(*arguments):
        out.mkdir()
        (out / "thesis.tex").write_text("x")
        return work(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_merge", slow)
        assert command.main([str(path), str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    monkeypatch.setattr(engine, "_merge_tensor", None)
    assert command.main([str(path), str(out)]) == 0
    assert (out / "model.safetensors").is_file()


def test_every_file_of_a_merge_may_be_replaced(tmp_path):
    """A file that a merge writes under a new name would make its own output foreign."""
    checkpoints.family(tmp_path)
    path = checkpoints.recipe(tmp_path, "rankmean")
    for options in ([], ["--max-shard-size", "4kB"], ["--max-shard-size", "4kB"], []):
        assert command.main([str(path), str(tmp_path / "out"), "--overwrite", *options]) == 0


def test_mount_point_is_refused(tmp_path, monkeypatch, capsys):
    checkpoints.family(tmp_path)
    path = checkpoints.recipe(tmp_path, each={"weight": 0.5})
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    assert command.main([str(path), str(tmp_path / "out")]) == 2
    assert "is a mount point, which cannot be replaced; name a folder in it" in capsys.readouterr().err


@pytest.mark.slow
def test_second_merge_into_one_folder_is_refused(tmp_path):
    """Two commands at once: one writes its own model, the other ends with one line."""
    checkpoints.family(tmp_path, layers=8, width=256, vocabulary=4000)
    recipes = []
    for number, method in enumerate(("linear", "rankmean")):
        (tmp_path / str(number)).mkdir()
        path = checkpoints.recipe(tmp_path, method, each={"weight": 0.5} if method == "linear" else {})
        recipes.append(path.rename(tmp_path / f"{method}.yml"))
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-m", "merge", str(recipes[0]), str(out)], stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / ".out.partial" / "merge.json"
    while not partial.exists() and first.poll() is None:
        time.sleep(0.001)
    first.send_signal(subprocess.signal.SIGSTOP)
    second = subprocess.run(
        [sys.executable, "-m", "merge", str(recipes[1]), str(out), "--overwrite"], capture_output=True, text=True
    )
    first.send_signal(subprocess.signal.SIGCONT)
    assert second.returncode == 2
    assert "another merge writes this folder now" in second.stderr
    assert second.stderr.count("\n") == 1
    assert first.communicate()[1] == ""
    assert first.returncode == 0
    assert "merge_method: linear" in (out / "merge_recipe.yml").read_text()
    alone = tmp_path / "alone"
    assert command.main([str(recipes[0]), str(alone)]) == 0
    assert (alone / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_names_of_a_merge_are_literal(tmp_path):
    """The patterns match no other file of weights."""
    from dsee_jax.errors import InputError

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_backup.safetensors").write_text("x")
    with pytest.raises(InputError, match="'model_backup.safetensors' in it"):
        destination.check(tmp_path / "out", [], overwrite=True)


def test_merged_model_is_uploaded(tmp_path, capsys, monkeypatch):
    checkpoints.family(tmp_path)
    path, out = checkpoints.recipe(tmp_path, each={"weight": 0.5}), tmp_path / "out"
    assert command.main([str(path), str(out), "--push", "a/b/c"]) == 2
    assert command.main([str(path), str(out), "--push", "team/merged", "--plan"]) == 2
    assert not out.exists()
    assert "--push uploads the merged model" in capsys.readouterr().err
    with hub.opened(monkeypatch) as server:
        assert command.main([str(path), str(out), "--push", "team/merged"]) == 0
    assert server.files["team/merged"] == {file.name: file.read_bytes() for file in out.iterdir()}
    assert capsys.readouterr().out.endswith(f"{out}\n{server.url}/team/merged\n")
