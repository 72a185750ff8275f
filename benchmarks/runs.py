"""The runs of a benchmark: each in a process of its own, resumed where it stopped, and repeated only if its config changed.

The process of a benchmark loads no model: on Linux a process inherits the peak memory of its parent.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dsee_jax import config as configs
from dsee_jax.train import config_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

CHOSEN = (
    "Score: of the best evaluation of a run, one after each pass over the data, on the dev set that chooses it; "
    "``final_last`` in the files of a run is the score of its last step."
)
"""The note below each table of scores of runs whose dev set is whole."""


def settings(config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the config of a run as plain values, without the places of its files, which do not change its figures."""
    values = _plain(config_file.read(config, overrides))
    del values["output_dir"], values["data"]["dir"]
    return values


def _plain(config: configs.Config) -> dict[str, Any]:
    return yaml.safe_load(config_file.dump(config))


def equal(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two results of `settings` are equal; a key that the older one lacks has its default value."""
    return _equal(before, now, _plain(configs.Config()))


def _equal(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    return before.keys() <= now.keys() and all(
        _equal(before.get(key, {}), value, defaults.get(key, {}))
        if isinstance(value, dict)
        else before.get(key, defaults.get(key)) == value
        for key, value in now.items()
    )


def train(config: Path, out: Path, overrides: Sequence[str], *, compiled: Path) -> dict[str, Any]:
    """Do the remaining part of a run in a new process, and return the content of its metrics.json.

    Args:
      config: the YAML file.
      out: the folder of the run.
      overrides: ``--section.key=value``.
      compiled: the folder of compiled programs, which runs of equal shapes share.

    Raises:
      subprocess.CalledProcessError: the run failed; its lines say why.
    """
    if not (out / "metrics.json").exists():
        print(f"== {out.name}", flush=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(compiled), **os.environ}
    command = [sys.executable, str(ROOT / "train.py"), str(config), f"--output_dir={out}", *overrides]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return json.loads((out / "metrics.json").read_text())


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown, and an empty line."""
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]
