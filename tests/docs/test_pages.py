"""The README and the pages of the documentation: their code runs, their commands parse, their files exist."""

import importlib.util
import json
import re
import subprocess

import numpy as np
import pytest
import yaml

import pages
import tiny
from dsee_jax.train import config_file
from merge.recipes import recipe

pytestmark = pytest.mark.docs

SHELLS = ("bash", "sh", "console")
LANGUAGES = {*SHELLS, "python", "yaml", "json"}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return pages.world(tmp_path_factory.mktemp("world"))


def with_blocks(*languages):
    """Parametrise over the pages that have such blocks."""
    chosen = [page for page in pages.PAGES if pages.blocks(page, *languages)]
    return pytest.mark.parametrize("page", chosen, ids=lambda page: str(page.relative_to(pages.ROOT)))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of packages that pages import beside this library
@with_blocks("python")
def test_the_python_of_a_page_runs(page, world, monkeypatch):
    """The blocks of a page share their names; ``batch``, ``ids`` and ``labels`` are the reader's data."""
    monkeypatch.chdir(world)
    names = {"batch": tiny.batch(rows=3), "labels": np.array([0, 1, 0])}
    names["ids"] = names["batch"]["input_ids"]
    for block in pages.blocks(page, "python"):
        if any(importlib.util.find_spec(package) is None for package in block.needs):
            continue
        # Errors show the line of the page.
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


@with_blocks(*SHELLS)
def test_the_commands_of_a_page_parse(page):
    for block in pages.blocks(page, *SHELLS):
        script = pages.script(block)
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert not done.returncode, done.stderr
        for words in pages.commands(script):
            try:
                pages.check(words)
            except SystemExit:
                pytest.fail(f"does not parse: {' '.join(words)}")


@with_blocks("yaml", "json")
def test_configs_and_recipes_of_a_page_are_valid(page, world, tmp_path):
    for block in pages.blocks(page, "yaml", "json"):
        if block.language == "json":
            assert json.loads(block.text)
            continue
        content = yaml.safe_load(block.text)
        if "apiVersion" in content:  # Kubernetes
            continue
        file = (world if "merge_method" in content else tmp_path) / f"{page.stem}_{block.line}.yml"
        file.write_text(block.text)
        recipe.read(file) if "merge_method" in content else config_file.read(file)


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_every_block_has_a_language_that_is_checked(page):
    assert {block.language for block in pages.blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", sorted(pages.ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_to_files_of_the_repository_work(page):
    """The build of the site checks the links of its own pages."""
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not re.match(r"https://[\w.-]+/", link):
            file, _, anchor = link.partition("#")
            assert not anchor or file, link
            assert (page.parent / file).exists(), link


def test_the_readme_is_short():
    assert len((pages.ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("words", ["python train.py configs/no.yaml", "python -m merge A", "pip install .[no]"])
def test_a_command_that_does_not_parse_fails(words):
    with pytest.raises((SystemExit, AssertionError)):
        pages.check(words.split())
