"""When a run prunes, and what its steps read afterwards."""

import pytest

from dsee_jax import cut
from dsee_jax.config import PruneConfig


def cubic(**options):
    return PruneConfig(schedule="cubic", **options)


def test_one_shot_cuts_once():
    assert cut.sparsities(PruneConfig(sparsity=0.7), 100) == {0: 0.7}


def test_cubic_by_hand():
    """1 - (1 - t)^3 at thirds of the way, on the steps 0 to 49 of 100 (half of the way to the last, 99)."""
    found = cut.sparsities(cubic(sparsity=0.54, schedule_updates=3), 100)
    assert list(found) == [0, 25, 50]
    assert list(found.values()) == pytest.approx([0.38, 0.52, 0.54])


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_all_is_cut_before_the_last_step(total, fraction):
    found = cut.sparsities(cubic(sparsity=0.5, schedule_fraction=fraction), total)
    assert min(found) == 0
    assert max(found) <= max(total - 1, 0)
    assert found[max(found)] == 0.5
    assert list(found.values()) == sorted(found.values())
