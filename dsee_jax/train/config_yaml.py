"""The YAML of a config: plain values, whose aliases expand to few values, and no key twice."""

from typing import Any

import yaml

from dsee_jax.errors import InputError

MOST = 10_000
"""The most values of a config, aliases expanded."""


def parse(where: str, text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
      InputError: no YAML, a repeated key, or more than `MOST` values; the message begins with ``where``.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())[:300]}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deep; expected sections such as 'model:' and 'data:'") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # PyYAML's errors for a value that does not fit its tag, such as 2024-99-99 or `!!int ""`.
        raise InputError(f"{where}: not YAML: a value does not fit its type ({error})") from None


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values below a node, aliases expanded; ``sizes`` holds those of the nodes before."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.MarkedYAMLError(problem="an alias of itself", problem_mark=node.start_mark)
        return sizes[id(node)]
    if isinstance(node, yaml.ScalarNode) and any("\ud800" <= character <= "\udfff" for character in node.value):
        raise yaml.MarkedYAMLError(problem="a character that no file can hold", problem_mark=node.start_mark)
    sizes[id(node)], size, keys = 0, 1, set[str]()
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = part if isinstance(node, yaml.MappingNode) else (None, part)
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is repeated", problem_mark=key.start_mark)
            keys.add(key.value)
        size += _size(value, sizes) + (0 if key is None else _size(key, sizes))
        if size > MOST:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST:,} values", problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size
