"""The architecture: imports follow the order of the wings, without circles, and generic code names no model."""

import ast
import importlib
import json
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import dsee_jax
import merge

ROOT = pathlib.Path(__file__).parents[1]

ORDER = {
    "dsee_jax": [
        *("lazy", "errors", "typing", "config", "auto_axes", "prng", "tree", "stacks", "orientation", "counts"),
        *("masks", "hf_layout", "runtime", "ops", "deltas", "nnx", "models", "prune", "metrics", "ckpt", "data"),
        *("generation", "train", "plan", "export", "analysis", "commands", "__main__"),
    ],
    "merge": [
        *("units", "leaf", "noise", "topk", "method", "methods", "arguments", "in_memory", "signatures"),
        *("mergekit_flags", "recipes", "inputs", "planning", "compare", "streaming", "outputs", "pipeline", "run"),
        "__main__",
    ],
}
"""The files and folders of each package; each may import only earlier entries."""

MERGE_MAY_IMPORT = {"lazy", "typing", "errors", "tree", "hf_layout", "ckpt", "runtime", "plan.roofline"}
"""The modules of `dsee_jax` that `merge` may import."""

ONLY_POSIX = (
    *("fork", "forkpty", "getuid", "geteuid", "chown", "mkfifo", "statvfs", "sysconf", "uname", "killpg", "setsid"),
    *("O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "sched_getaffinity", "sendfile", "getpgid", "nice"),
)
ONLY_POSIX_SIGNALS = ("SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGQUIT", "alarm", "setitimer")
"""Names of ``os`` and ``signal`` that Windows lacks."""

FILES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def module(path: pathlib.Path) -> str:
    """The dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imports(path: pathlib.Path) -> list[tuple[str, str | None]]:
    """``(module, alias or None)`` of every import of these packages in a file, also inside functions."""
    result = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in MODULES:
                    result.append((name, alias.asname))
                elif node.module in MODULES:
                    result.append((node.module, None))
        elif isinstance(node, ast.Import):
            result += [(alias.name, alias.asname) for alias in node.names if alias.name in MODULES]
    return result


def place(name: str) -> tuple[str, int]:
    """The package of a module, and the position of its wing in the order."""
    package, *wing = name.split(".")
    return package, ORDER[package].index(wing[0]) if wing else len(ORDER[package])


@pytest.mark.parametrize("package", ORDER)
def test_order_names_every_file_and_folder(package):
    folder = ROOT / package
    wings = {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}
    assert wings | {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(ORDER[package])


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_down_the_order(path):
    own, (package, level) = module(path), place(module(path))
    for name, alias in imports(path):
        assert alias is None, f"{own} imports {name} as {alias}: rename the clashing name"
        if name.split(".")[0] != package:
            continue
        inside = name.split(".")[:2] == own.split(".")[:2]
        face = path.name == "__init__.py" and len(path.relative_to(ROOT).parts) == 2
        assert inside or face or place(name)[1] < level, f"{own} imports {name}, which comes later in the order"


def test_imports_have_no_circle():
    graph = {name: {target for target, _ in imports(path)} - {name} for name, path in MODULES.items()}
    # A wing's __init__ imports its public parts for type checkers only.
    graph = {name: targets for name, targets in graph.items() if MODULES[name].name != "__init__.py"}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in graph and name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_merge_imports_only_allowed_modules_of_dsee_jax():
    for path in FILES:
        if place(module(path))[0] != "merge":
            continue
        for name, _ in imports(path):
            package, *rest = name.split(".")
            assert package == "merge" or {".".join(rest), *rest[:1]} & MERGE_MAY_IMPORT, f"{path} imports {name}"


def test_dsee_jax_imports_nothing_of_merge():
    for path in FILES:
        if place(module(path))[0] == "dsee_jax":
            assert not [name for name, _ in imports(path) if name.split(".")[0] == "merge"], path


def test_generic_code_names_no_model():
    for path in FILES:
        if path.is_relative_to(ROOT / "dsee_jax" / "models"):
            continue
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        names = re.findall(r"\b(?:bert|roberta|gpt2|llama|deberta|mpnet)\b", code, flags=re.IGNORECASE)
        assert not names, f"{path} names {names}"


@pytest.mark.smoke
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_module_imports_and_has_a_docstring(path):
    assert importlib.import_module(module(path)).__doc__


@pytest.mark.smoke
def test_import_works_on_windows():
    """Importing needs no module, function or constant that the standard library of Windows lacks."""
    code = f"""
import importlib, os, signal, sys
sys.modules.update(fcntl=None, resource=None)
for name in {list(MODULES)}:
    importlib.import_module(name)
# Again, without what the libraries below use where they find it.
for name in [name for name in sys.modules if name.split(".")[0] in {list(ORDER)}]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(("pwd", "grp", "termios", "tty", "pty", "syslog", "posix")))
for module, names in ((os, {ONLY_POSIX}), (signal, {ONLY_POSIX_SIGNALS})):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in {list(MODULES)}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def missing() -> dict[str, list[str]]:
    """The submodules of each package that its name does not reach in a process that imports the package alone.

    One process for both: that of `merge` imports `dsee_jax` too, and `dsee_jax` nothing of `merge`.
    """
    code = "import json, sys\nmissing = {}\n"
    for package in (dsee_jax, merge):
        names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        names = [name for name in names if not name.endswith("__main__")]
        code += f"""
assert "{package.__name__}" not in sys.modules
import {package.__name__}
missing["{package.__name__}"] = []
for name in {names}:
    try:
        eval(name)
    except Exception as error:
        missing["{package.__name__}"].append(f"{{name}}: {{error}}")
"""
    return json.loads(output(f"{code}\nprint(json.dumps(missing))"))


def output(code: str) -> str:
    """The last line that a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.smoke
@pytest.mark.parametrize("package", [dsee_jax, merge], ids=lambda package: package.__name__)
def test_every_submodule_is_an_attribute_in_a_fresh_process(package, missing):
    """README and error messages name submodules, which work without further imports."""
    assert missing[package.__name__] == []


@pytest.mark.smoke
def test_every_public_name_exists():
    for name in dsee_jax.__all__:
        assert name in dir(dsee_jax)
        assert getattr(dsee_jax, name)
    for package in (dsee_jax.deltas, dsee_jax.prune, dsee_jax.generation):
        for name in package.__all__:
            assert name in dir(package)
            assert getattr(package, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dsee_jax.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dsee_jax.prune.nothing  # noqa: B018


UNNEEDED = [
    ("import dsee_jax", ("jax", "numpy", "flax", "yaml")),
    ("from dsee_jax import DeltaConfig", ("jax", "numpy", "flax", "yaml")),
    ("import train; train.parser()", ("jax", "numpy", "flax", "yaml")),
    ("from dsee_jax.__main__ import parser; parser()", ("jax", "numpy", "flax", "yaml")),
    ("import dsee_jax.train.loop", ("sklearn", "scipy.stats", "scipy.special", "scipy.optimize", "transformers")),
    ("from merge.__main__ import compare_parser, parser; parser(), compare_parser()", ("jax", "numpy", "yaml")),
    (
        "import merge.run",
        ("flax", "optax", "orbax", "transformers", "huggingface_hub", "rich", "matplotlib", "PIL"),
    ),
]


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The libraries of `UNNEEDED` that are loaded after each line of code.

    One process runs all lines, those that may load the fewest libraries first. A library that a line loads is there after the
    later lines too, and none of their lists has one that an earlier line may load.
    """
    last = ["import merge.run", "import dsee_jax.train.loop"]
    lines = sorted(UNNEEDED, key=lambda each: last.index(each[0]) if each[0] in last else -1)
    code = "import json, sys\nloaded = {}\n"
    for line, heavy in lines:
        code += f"{line}\nloaded[{line!r}] = [name for name in {heavy} if name in sys.modules]\n"
    return json.loads(output(f"{code}\nprint(json.dumps(loaded))"))


@pytest.mark.parametrize(("code", "heavy"), UNNEEDED)
def test_import_loads_no_unneeded_library(code, heavy, loaded):
    assert loaded[code] == [], f"{code} loads some of {heavy}"
