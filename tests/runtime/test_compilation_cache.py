"""Compiled programs stay in the user's cache folder: the second start of a command loads them."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import train
from dsee_jax import __main__ as commands
from dsee_jax.errors import InputError
from dsee_jax.runtime import compilation_cache
from merge import __main__ as merging

START = """
import argparse, collections, json, sys
import jax, jax.numpy as jnp
from dsee_jax.runtime import compilation_cache

parser, events = argparse.ArgumentParser(), collections.Counter()
compilation_cache.arguments(parser)
compilation_cache.use(parser.parse_args(sys.argv[1:]))
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
jax.jit(lambda x: jnp.sin(x) + 1)(jnp.arange(3.0)).block_until_ready()
most = jax.config.jax_compilation_cache_max_size
print(json.dumps({"loaded": events["cache_hits"], "kept": events["cache_misses"], "most": most}))
"""


def start(home, *flags, **environment):
    """The counts of programs that a process loads from its cache folder, and keeps there; and the most bytes of the folder."""
    plain = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    always = {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", START, *flags],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=plain | always | environment,
    )
    return json.loads(done.stdout)


def names(home):
    return sorted(path.name for path in home.rglob("*-cache"))


def test_second_start_compiles_nothing(tmp_path):
    first = start(tmp_path)
    kept = names(tmp_path)
    assert first == {"loaded": 0, "kept": len(kept), "most": compilation_cache.BYTES}
    assert kept
    assert start(tmp_path) == first | {"loaded": len(kept), "kept": 0}
    off = {"loaded": 0, "kept": 0, "most": -1}
    assert start(tmp_path, "--no-compilation-cache") == off
    assert names(tmp_path) == kept


def test_choice_of_the_environment_stays(tmp_path):
    start(tmp_path / "unused", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert names(tmp_path / "own")
    assert start(tmp_path / "unused", JAX_ENABLE_COMPILATION_CACHE="false") == {"loaded": 0, "kept": 0, "most": -1}
    assert not (tmp_path / "unused").exists()


COMMANDS = {
    "train": (train.main, []),
    "dsee_jax": (commands.main, ["evaluate", "nowhere"]),
    "merge compare": (merging.main, ["compare", "a", "b"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_keep_programs(monkeypatch, capsys, name):
    def used(options):
        raise InputError(f"the flag is {options.no_compilation_cache}")

    monkeypatch.setattr(compilation_cache, "use", used)
    command, arguments = COMMANDS[name]
    assert command([*arguments, "--no-compilation-cache"]) == 2
    assert "the flag is True" in capsys.readouterr().err


@pytest.mark.parametrize("verb", commands.NOT_CACHED)
def test_verb_that_measures_compilation_keeps_nothing(monkeypatch, verb):
    monkeypatch.setattr(compilation_cache, "use", None)
    monkeypatch.setattr(commands.VERBS[verb], "run", lambda options: None)
    assert commands.main([verb, "nowhere"]) == 0


@pytest.mark.parametrize(("job", "called"), [({}, [True]), ({"process": 0}, []), ({"distributed": True}, [])])
def test_processes_of_a_job_keep_nothing(monkeypatch, job, called):
    calls = []
    monkeypatch.setattr(compilation_cache, "enable", lambda: calls.append(True))
    compilation_cache.use(argparse.Namespace(no_compilation_cache=False, **job))
    assert calls == called


def _no_home(path):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("fault", ["a file", "writable by others", "no home"])
def test_folder_that_cannot_be_used_is_one_warning(monkeypatch, caplog, tmp_path, fault):
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    if fault == "a file":
        home.touch()
    elif fault == "writable by others":
        (home / "dsee_jax" / "compiled").mkdir(parents=True)
        (home / "dsee_jax" / "compiled").chmod(0o777)
    else:
        monkeypatch.setattr(pathlib.Path, "expanduser", _no_home)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert compilation_cache.enable() is None
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    (record,) = caplog.records
    place = "the cache folder of this user" if fault == "no home" else f"{home}/dsee_jax/compiled"
    assert f"{place}: compiled programs are not kept there" in record.getMessage()


def test_interrupted_writes_go(tmp_path):
    """JAX writes the time of use after the program; without it, JAX 0.10 writes no further programs."""
    for name in ("whole-cache", "whole-atime", "interrupted-cache"):
        (tmp_path / name).touch()
    compilation_cache._tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"whole-cache", "whole-atime", ".lockfile"}


def test_least_recently_used_programs_go(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation_cache, "PROGRAMS", 2)
    for name, used in {"a": 9, "b": 1, "c": 5}.items():
        (tmp_path / f"{name}-cache").touch()
        (tmp_path / f"{name}-atime").touch()
        os.utime(tmp_path / f"{name}-atime", (0, used))
    compilation_cache._tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a-cache", "a-atime", "c-cache", "c-atime", ".lockfile"}
