"""Check that the tests detect faults: ``python -m tests.faults [NAME ...]`` runs the tests of each fault on a faulty copy.

A fault replaces text in one file. The TOML files in this folder list the faults::

    [[fault]]
    name = "masks-apply-inverted"
    file = "dsee_jax/masks.py"
    old = "text that occurs exactly once in the file"
    new = "its replacement"
    tests = ["tests/test_masks.py"]     # pytest's arguments; one of these tests must fail

Exhaustive tests run where all tests of a fault are.
Without NAME, all faults are tested. NAME may be a glob pattern. The exit status is 1 if a fault is not detected.
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
"""The time limit of one test run; a run that exceeds the limit counts as detected, since the suite would hang."""


def read() -> dict[str, dict]:
    """Return the faults by name; raise ValueError for a fault that does not match the sources."""
    faults = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.toml")):
        for fault in tomllib.loads(path.read_text())["fault"]:
            count = (ROOT / fault["file"]).read_text().count(fault["old"])
            if count != 1:
                raise ValueError(
                    f"{path.name}: {fault['name']}: 'old' occurs {count} times in {fault['file']}, not once"
                )
            if fault["name"] in faults:
                raise ValueError(f"{path.name}: two faults are named {fault['name']}")
            for test in fault["tests"]:
                if not (ROOT / test.partition("::")[0]).exists():
                    raise ValueError(f"{path.name}: {fault['name']}: {test} does not exist")
            faults[fault["name"]] = fault
    return faults


def copy(folder: pathlib.Path) -> None:
    """Copy the tracked files of the working tree into ``folder``, and link the data folder beside it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if (ROOT.parent / "shared").exists() and not (folder.parent / "shared").exists():
        (folder.parent / "shared").symlink_to(ROOT.parent / "shared")


def detected(fault: dict, folder: pathlib.Path, cache: pathlib.Path) -> tuple[bool, str]:
    """Run the fault's tests on the copy in ``folder``; return whether a test failed, and the line of the failure."""
    path = folder / fault["file"]
    text = path.read_text()
    path.write_text(text.replace(fault["old"], fault["new"]))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", *fault["tests"]]
    try:
        for tier in ("not exhaustive", "exhaustive"):
            done = subprocess.run(
                [*command, "-m", tier], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
            if done.returncode != 5:  # 5: no test was selected
                break
    except subprocess.TimeoutExpired:
        return True, f"not finished after {SECONDS} s"
    finally:
        path.write_text(text)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    # 0: all tests passed; 1: a test failed; 2: the tests could not be imported.
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"{fault['name']}: pytest ended with {done.returncode}: {lines[-1]}")
    failed = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
    return done.returncode != 0, failed


def main(arguments: list[str]) -> int:
    """Test the named faults; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="names or glob patterns (default: all)")
    parser.add_argument("-n", type=int, default=2, metavar="N", help="number of faults tested at once (default: 2)")
    parser.add_argument("--list", action="store_true", help="list the faults and exit")
    options = parser.parse_args(arguments)
    faults = read()
    unknown = [name for name in options.names if not fnmatch.filter(faults, name)]
    if unknown:
        parser.error(f"no fault matches {unknown[0]!r}; --list prints all faults")
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
                return fault["name"], *detected(fault, folder, pathlib.Path(place, "compiled"))
            finally:
                folders.append(folder)

        with concurrent.futures.ThreadPoolExecutor(options.n) as pool:
            for name, failed, line in pool.map(attempt, chosen):
                print(f"{'detected' if failed else 'MISSED':8} {name:50} {line}", flush=True)
                missed += [] if failed else [name]
    print(
        f"{len(chosen) - len(missed)} of {len(chosen)} faults detected"
        + (f"; missed: {', '.join(missed)}" * bool(missed))
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
