"""The faults of `tests.faults`, which runs apart: each still has a place in the sources, and tests that exist."""

import pytest

from tests.faults import __main__ as faults


def test_every_fault_has_one_place_in_the_sources():
    """Otherwise the command stops before it tests anything."""
    assert faults.read()


@pytest.mark.parametrize("area", ["benchmarks", "dsee_jax", "merge"])
def test_the_tests_of_every_fault_exist(area):
    """A fault counts as detected when pytest fails, also because a test is gone."""
    of_area = {name: fault for name, fault in faults.read().items() if fault["file"].startswith(f"{area}/")}
    assert of_area
    for name, fault in of_area.items():
        for test in fault["tests"]:
            path, *names = test.partition("[")[0].split("::")
            place = faults.ROOT / path
            assert place.exists(), (name, test)
            assert not names or f"def {names[-1]}(" in place.read_text(encoding="utf-8"), (name, test)
