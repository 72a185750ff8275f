"""The scripts that complete the words of the commands in a shell."""

import importlib
import pathlib
import shutil
import subprocess
import sys
import tomllib
import types

import pytest

from dsee_jax import __main__ as verbs
from dsee_jax.train import config_file
from merge import __main__ as merges

ROOT = pathlib.Path(__file__).parents[2]


def script(main, shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert not stop.value.code
    return capsys.readouterr().out


WORDS = {
    "a verb": ("dsee-jax pl", "plan"),
    "an option": ("dsee-jax plan --topo", "--topology"),
    "a choice": ("dsee-jax export --format sta", "stablehlo"),
    "a key": ("dsee-jax evaluate --train.se", "--train.seed="),
    "a file": ("dsee-jax plan pypro", "pyproject.toml"),
    "an option of a merge": ("dsee-merge --over", "--overwrite"),
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(capsys):
    scripts = "".join(script(main, "bash", capsys) for main in (verbs.main, merges.main))
    lines = [
        f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; COMPREPLY=()\n"
        f'_complete_{words.split()[0].replace("-", "_")} {words.split()[0]} {words.split()[-1]}\necho "${{COMPREPLY[*]}}"\n'
        for words, _ in WORDS.values()
    ]
    text = f"compopt() {{ :; }}\n{scripts}{''.join(lines)}"
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == [expected for _, expected in WORDS.values()]


def test_zsh_takes_a_value_after_a_key(capsys):
    assert '"--train.seed=[' in script(verbs.main, "zsh", capsys)


def test_verbs_with_overrides_complete_every_key(monkeypatch, capsys):
    """With a stand-in for shtab, which prints the options of a verb."""

    def complete(parser, shell):
        del shell
        (verb,) = [action for action in parser._actions if action.dest == "verb"]
        return " ".join(verb.choices["plan"]._option_string_actions)

    monkeypatch.setitem(sys.modules, "shtab", types.SimpleNamespace(FILE="file", complete=complete))
    with pytest.raises(SystemExit):
        verbs.main(["--print-completion", "zsh"])
    keys = [*config_file.keys()]
    assert {("output_dir", ()), ("mesh.fsdp", ())} < set(keys)
    assert {f"--{key}=" for key, _ in keys} < set(capsys.readouterr().out.split())


def test_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        verbs.main(["--print-completion", "bash"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("--print-completion needs shtab: pip install 'dsee-jax[completion]'\n")


def test_console_scripts_exist():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {"dsee-jax", "dsee-merge"}
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
