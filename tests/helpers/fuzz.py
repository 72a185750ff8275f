"""Random bad input: values, changes of a JSON-like tree and of a text, and a time limit for each input."""

import contextlib
import copy
import signal

from dsee_jax.errors import InputError

SECONDS = 20
"""The time limit of one input."""

LONGEST = 2000
"""The longest message of an error, in characters."""

NUMBERS = (
    0,
    1,
    -1,
    2,
    0.5,
    -0.0,
    1e-320,
    1e308,
    -1e308,
    2**31,
    2**63,
    10**40,
    10**399,
    float("nan"),
    float("inf"),
    -float("inf"),
)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "1",
        "nan",
        "true",
        "null",
        "~",
        "=",
        "<<",
        "/",
        ".",
        "..",
        "../x",
        "a\0b",
        "\n",
        "\t",
        "a\nb: c",
        "é",
        "\u202e",
    ),
    *(
        "\u2028",
        "\x85",
        "\ufeff",
        "\x1b[2J",
        "🙂",
        "x" * 3000,
        "[/x]",
        "a|b`c```",
        "<b>",
        "{{ 1/0 }}",
        "(a+)+$",
        "[",
        "(?P<unit>",
        "*",
    ),
    *("{% for i in range(10**9) %}x{% endfor %}", "!!python/object:os.system", "package:", "package:.", "package:..x"),
    *("~nobody/x", "a@b", "a+b", "a@", "+", "layer", "tensor", "base", "union", "auto", "float32", "bfloat16", "int8"),
)


class TooSlowError(BaseException):
    """The input took longer than its time limit; no handler of the tested code catches this."""


@contextlib.contextmanager
def limited(seconds=SECONDS):
    """Raise `TooSlowError` if the body takes longer; works in the main thread."""

    def stop(*_):
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(work, where):
    """Return the message of the `InputError` that ``work`` raises, None if it succeeds; any other error fails the test."""
    try:
        with limited():
            work()
    except InputError as error:
        text = str(error)
    except BaseException as error:
        raise AssertionError(where) from error
    else:
        return None
    assert len(text) < LONGEST, f"{where}: {text[:300]}"
    return text


def value(random, depth=3):
    """Return any value of JSON or YAML."""
    kind = random.randrange(8 if depth else 6)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice(TEXTS)
    if kind == 5:
        return random.choice((None, True, False, [], {}))
    if kind == 6:
        return [value(random, depth - 1) for _ in range(random.randrange(4))]
    return {random.choice(TEXTS): value(random, depth - 1) for _ in range(random.randrange(3))}


def alike(random, former):
    """Return another value of the same kind, which the checks of types let pass."""
    if isinstance(former, bool):
        return not former
    if isinstance(former, (int, float)):
        return random.choice((*NUMBERS, -former, former * 3, former + 1, [former, 0.5], [{"value": former}]))
    return random.choice(TEXTS) if isinstance(former, str) else value(random)


def places(tree):
    """Return ``(container, key)`` of every value in a tree of dicts and lists."""
    found, waiting = [], [tree]
    while waiting:
        container = waiting.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in list(keys):
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def changed(random, tree, *, values=value, keys=TEXTS):
    """Return a copy of a tree with one to three changes: values, keys, copies, nesting.

    Half of the copies keep their form, and have other leaves only.
    """
    tree = copy.deepcopy(tree)
    if random.randrange(2):
        leaves = [(container, key) for container, key in places(tree) if not isinstance(container[key], (dict, list))]
        for container, key in random.sample(leaves, min(len(leaves), random.randrange(1, 3))):
            container[key] = values(random) if random.randrange(3) == 0 else alike(random, container[key])
        return tree
    for _ in range(random.randrange(1, 4)):
        if not (found := places(tree)):
            return tree
        container, key = random.choice(found)
        kind = random.randrange(8)
        if kind < 3:
            container[key] = values(random)
        elif kind == 3:
            del container[key]
        elif kind == 4 and isinstance(container, dict):
            container[random.choice(keys)] = container.pop(key)
        elif kind == 5:
            other, name = random.choice(found)
            with contextlib.suppress(KeyError, IndexError):  # the change before may have taken it away
                container[key] = copy.deepcopy(other[name])
        elif kind == 6:
            for _ in range(random.choice((1, 1, 2, 40))):
                container[key] = random.choice(([container[key]], {random.choice(keys): container[key]}))
        elif isinstance(container, dict):
            container[random.choice(keys)] = values(random)
        else:
            container.insert(key, copy.deepcopy(container[key]))
    return tree


def scrambled(random, data, parts):
    """Return bytes with one or two changes: bytes and ``parts`` put in, cut out, repeated or replaced."""
    for _ in range(random.randrange(1, 3)):
        at = random.randrange(len(data) + 1)
        end = min(len(data), at + random.choice((1, 1, 4, 40)))
        kind = random.randrange(5)
        if kind == 0:
            data = data[:at] + random.choice(parts) + data[at:]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:end] + data[at:end] * random.choice((1, 3)) + data[end:]
        elif kind == 3:
            data = data[:at] + random.randbytes(end - at) + data[end:]
        else:
            data = data[:at]
    return data


def tree(folder):
    """Return the names of all files below a folder with their sizes, without the locks of commands, which stay."""
    return {
        str(path): path.lstat().st_size if path.is_file() else 0 for path in folder.rglob("*") if path.suffix != ".lock"
    }
