"""The faults of `tests.faults`, which runs apart: each still has a place in the sources, and tests that exist."""

import pathlib

from tests.faults import __main__ as faults


def test_every_fault_has_one_place_and_its_tests():
    """A fault whose text has moved would stop the command, and one whose tests are gone counts as detected."""
    for name, fault in faults.read().items():
        for test in fault["tests"]:
            path, _, function = test.partition("::")
            text = (pathlib.Path(faults.ROOT) / path).read_text() if path.endswith(".py") else ""
            assert (pathlib.Path(faults.ROOT) / path).exists(), (name, test)
            assert f"def {function.partition('[')[0].split('::')[-1]}(" in text or not function, (name, test)
