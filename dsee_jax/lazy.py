"""Lazy packages: a submodule or a public name is imported at its first use, so ``import dsee_jax`` is fast."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def package(name: str, public: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package: every submodule is an attribute, and so is every public name.

    Args:
      name: the ``__name__`` of the package.
      public: ``{name: defining submodule}``.
    """

    def get(attribute: str) -> Any:
        try:
            module = importlib.import_module(f"{name}.{public.get(attribute, attribute)}")
        except ModuleNotFoundError as error:
            if error.name != f"{name}.{attribute}":
                raise
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}") from None
        value = getattr(module, attribute) if attribute in public else module
        setattr(sys.modules[name], attribute, value)
        return value

    def names() -> list[str]:
        submodules = [module.name for module in pkgutil.iter_modules(sys.modules[name].__path__)]
        return sorted({*vars(sys.modules[name]), *public, *submodules} - {"__main__"})

    return get, names
