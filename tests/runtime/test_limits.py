"""The limits on open files and address space are checked, and raised where the system allows it."""

import resource

import pytest

from dsee_jax.errors import InputError
from dsee_jax.runtime import limits


def test_soft_limit_on_open_files_is_raised(monkeypatch):
    monkeypatch.setattr(limits, "_opened", lambda: 10)
    changed = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: changed.append((kind, limit)))
    for soft, hard, expected in ((200, 300, []), (100, 300, [(118, 300)]), (100, -1, [(118, -1)]), (-1, -1, [])):
        changed.clear()
        numbers = {resource.RLIMIT_NOFILE: (soft, hard)}
        monkeypatch.setattr(resource, "getrlimit", lambda kind, numbers=numbers: numbers.get(kind, (-1, -1)))
        limits.check(open_files=100, mapped=1 << 60)
        assert changed == [(resource.RLIMIT_NOFILE, pair) for pair in expected]


def test_limit_that_cannot_be_raised_is_an_error(monkeypatch):
    monkeypatch.setattr(limits, "_opened", lambda: 10)
    numbers = {resource.RLIMIT_NOFILE: (100, 110)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: numbers.get(kind, (-1, -1)))
    with pytest.raises(
        InputError, match="118 files must be open at once, and the limit is 110; raise it: ulimit -n 118"
    ):
        limits.check(open_files=100, mapped=0)
    numbers = {resource.RLIMIT_AS: (10**12, -1)}
    limits.check(open_files=100, mapped=10**11)
    with pytest.raises(InputError, match="the limit is 1 TB; raise it: ulimit -v unlimited"):
        limits.check(open_files=100, mapped=10**12)
