"""The type of a merge method: a pure function of one leaf, and the options that it takes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Array
from merge.leaf import Leaf

LARGEST = 3.4028234663852886e38
"""The largest float32, in which all methods compute."""


class Option(NamedTuple):
    """One option of a method: its type, its default, its range, and its meaning in one line."""

    kind: type[float] | type[str]  # float, int, bool or str
    default: float | str | None  # None: the option is required
    help: str
    low: float = float("-inf")
    high: float = float("inf")
    low_open: bool = False  # the value low is excluded
    choices: tuple[str, ...] = ()
    effect: bool = True  # False: any value gives the same result
    static: bool = False  # True: sizes follow from a number, which therefore may not be traced

    def check(self, where: str, value: Any) -> Any:
        """Return ``value`` in this option's type.

        Raises:
          InputError: a value of another type or out of range; the message begins with ``where``.
        """
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023  # more is no float
        number = whole or isinstance(value, float)
        valid = {
            float: number,
            int: number and value == int(value) if number and abs(value) < 2**63 else False,
            bool: isinstance(value, bool) or value in (0, 1),
            str: isinstance(value, str),
        }[self.kind]
        if not valid:
            raise InputError(f"{where} is {value!r}; expected {self.expected}")
        if number and not (self.low < value <= self.high or (value == self.low and not self.low_open)):
            raise InputError(f"{where} is {value!r}; expected {self.expected}")
        if number and self.kind is float and abs(value) > LARGEST:
            raise InputError(f"{where} is {value!r}; expected {self.expected}, of at most {LARGEST:g} as float32")
        if self.choices and value not in self.choices:
            raise InputError(f"{where} is {value!r}{did_you_mean(str(value), self.choices)}; expected {self.expected}")
        return self.kind(value)

    @property
    def expected(self) -> str:
        """The accepted values, for an error or a help text."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        name = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[self.kind]
        if (self.low, self.high) == (float("-inf"), float("inf")):
            return name
        if self.high == float("inf"):
            return f"{name} {'above' if self.low_open else 'of at least'} {self.low:g}"
        return f"{name} in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"


KEYWORDS = {"lambda": "scale", "method": "over"}
"""The keywords of options whose recipe names are reserved in Python or by `merge.merge`; other options keep their names."""


class Method(NamedTuple):
    """A merge method: its function, its options, and the inputs that it needs.

    ``merge(leaf, **options, **extra)`` returns the merged tensor, float32, through the leaf's folds and one map. An option
    in ``each`` is a sequence with one value per model, an option in ``shared`` is one value; both are passed under the
    option's keyword. ``prepare(leaves, options)``, if not None, reads the whole model first: from all leaves and the options
    of each leaf it returns ``extra``, further keyword arguments for each leaf.
    """

    merge: Callable[..., Array]
    each: Mapping[str, Option]
    shared: Mapping[str, Option]
    help: str  # one line, with the paper
    # required: changes are measured from a base; optional: a base is accepted; none: a base counts as one of the models
    base: Literal["required", "optional", "none"] = "required"
    models: tuple[int, int | None] = (1, None)  # minimum and maximum number of models, without the base
    by_rows: Callable[..., bool] = lambda **options: False  # whether tiles must hold complete rows under these options
    exact: bool = True  # False: the method draws random numbers
    # data statistics of every model: elements, one array per tensor, `Tile.statistics`; grams, matrices, the keyword ``grams``
    statistics: Literal["none", "elements", "grams"] = "none"
    # check(where, **options) raises InputError, beginning with ``where``, for options that contradict each other
    check: Callable[..., None] = lambda where, **options: None
    prepare: Callable[[Sequence[Leaf], Sequence[Mapping[str, object]]], list[dict[str, object]]] | None = None

    def keywords(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``options``, whose keys are recipe names, under the keywords of ``merge``."""
        return {KEYWORDS.get(name, name): value for name, value in options.items()}
