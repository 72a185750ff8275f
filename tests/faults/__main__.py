"""Checks that the tests notice faults: ``python -m tests.faults [NAME ...]`` puts each fault into a copy and runs its tests.

A fault is a replacement of text in one file; the TOML files beside this one list them::

    [[fault]]
    name = "masks-apply-inverted"
    file = "dsee_jax/masks.py"
    old = "text that occurs once in the file"
    new = "its replacement"
    tests = ["tests/test_masks.py"]     # the tests that must fail, as arguments of pytest

With no NAME, all faults are tried. NAME may be a glob pattern. The exit status is 1 if a fault is not noticed.
"""

import argparse
import concurrent.futures
import fnmatch
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 600
"""Limit of one run of tests; a run that takes longer counts as noticed, since the suite would hang."""


def read() -> dict[str, dict]:
    """Return the faults by name; raise ValueError for one that does not fit the sources."""
    faults = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.toml")):
        for fault in tomllib.loads(path.read_text())["fault"]:
            count = (ROOT / fault["file"]).read_text().count(fault["old"])
            if count != 1:
                raise ValueError(
                    f"{path.name}: {fault['name']}: 'old' occurs {count} times in {fault['file']}, not once"
                )
            if fault["name"] in faults:
                raise ValueError(f"{path.name}: {fault['name']} is there twice")
            for test in fault["tests"]:
                if not (ROOT / test.partition("::")[0]).exists():
                    raise ValueError(f"{path.name}: {fault['name']}: no file {test}")
            faults[fault["name"]] = fault
    return faults


def copy(folder: pathlib.Path) -> None:
    """Copy the files that git tracks, as they are in the working tree, and link the data folder beside them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if (ROOT.parent / "shared").exists() and not (folder.parent / "shared").exists():
        (folder.parent / "shared").symlink_to(ROOT.parent / "shared")


def noticed(fault: dict, folder: pathlib.Path, cache: pathlib.Path) -> tuple[bool, str]:
    """Run the fault's tests on the copy in ``folder``; return whether one failed, and the last line of pytest."""
    path = folder / fault["file"]
    text = path.read_text()
    path.write_text(text.replace(fault["old"], fault["new"]))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-m",
        "not exhaustive",
    ]
    try:
        done = subprocess.run(
            [*command, *fault["tests"]], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return True, f"no end after {SECONDS} s"
    finally:
        path.write_text(text)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    # 1: a test failed; 2: the tests could not be imported; 0: all passed.
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"{fault['name']}: pytest ended with {done.returncode}: {lines[-1]}")
    failed = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
    return done.returncode != 0, failed


def main(arguments: list[str]) -> int:
    """Try the faults that are named and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="names or glob patterns (default: all)")
    parser.add_argument("-n", type=int, default=2, metavar="N", help="how many are tried at once (default: 2)")
    parser.add_argument("--list", action="store_true", help="list the faults and exit")
    options = parser.parse_args(arguments)
    faults = read()
    unknown = [name for name in options.names if not fnmatch.filter(faults, name)]
    if unknown:
        parser.error(f"no fault is called {unknown[0]!r}; --list shows them all")
    patterns = options.names or ["*"]
    chosen = [fault for name, fault in faults.items() if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
    if options.list:
        for fault in chosen:
            print(f"{fault['name']:50} {fault['file']}")
        return 0
    missed = []
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        folders = [pathlib.Path(place, str(number), "checkout") for number in range(options.n)]
        for folder in folders:
            copy(folder)

        def attempt(fault: dict) -> tuple[str, bool, str]:
            folder = folders.pop()
            try:
                return fault["name"], *noticed(fault, folder, pathlib.Path(place, "compiled"))
            finally:
                folders.append(folder)

        with concurrent.futures.ThreadPoolExecutor(options.n) as pool:
            for name, found, line in pool.map(attempt, chosen):
                print(f"{'noticed' if found else 'MISSED ':8} {name:50} {line}", flush=True)
                missed += [] if found else [name]
    print(
        f"{len(chosen) - len(missed)} of {len(chosen)} faults noticed"
        + (f"; missed: {', '.join(missed)}" * bool(missed))
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
