"""A built-in task for decoders that needs no files: describe a restaurant from its attributes, as in the E2E challenge.

A prompt lists attributes, such as *name[The Blue Door], food[Thai], area[harbour]*; the completion says the same in English.
Names, values and sentences are this library's own, drawn from a small grammar.
"""

import numpy as np

from dsee_jax.data.examples import Prompts, Task

_NAMES = (
    *(
        "The Blue Door",
        "Quince",
        "Harvest Table",
        "The Old Mill",
        "Saffron House",
        "Marlow's",
        "The Copper Pot",
        "Juniper",
    ),
    *(
        "Little Harbour",
        "The Green Lantern",
        "Bramble",
        "Corner Kitchen",
        "The White Heron",
        "Olive and Thyme",
        "Pepperwood",
    ),
)
_VALUES = {
    "eatType": ("restaurant", "cafe", "pub", "bistro"),
    "food": ("Thai", "Italian", "Indian", "French", "Japanese", "vegetarian", "Greek"),
    "priceRange": ("cheap", "moderate", "expensive"),
    "rating": ("poor", "good", "excellent"),
    "area": ("harbour", "old town", "market square"),
    "familyFriendly": ("yes", "no"),
    "near": _NAMES,
}
_OPTIONAL = ("food", "priceRange", "rating", "area", "familyFriendly", "near")
"""Attributes that a restaurant may lack; it has two or more of them."""

_DETAILS = {
    "priceRange": ("Its prices are {}", "You will find {} prices there"),
    "rating": ("Guests give it {} reviews", "Its reviews are {}"),
    "yes": ("Children are welcome", "It suits families"),
    "no": ("It is not meant for children", "It does not suit families"),
}
"""The ways to say an attribute in a sentence of its own."""

REFERENCES = 3
"""Texts per dev prompt."""


def _restaurant(rng: np.random.Generator) -> dict[str, str]:
    """Return the attributes of a random restaurant, in a fixed order."""
    chosen = set(rng.choice(_OPTIONAL, rng.integers(2, len(_OPTIONAL) + 1), replace=False))
    name = str(rng.choice(_NAMES))
    options = {key: [value for value in values if value != name] for key, values in _VALUES.items()}
    return {"name": name} | {
        key: str(rng.choice(values)) for key, values in options.items() if key == "eatType" or key in chosen
    }


def _text(restaurant: dict[str, str], rng: np.random.Generator) -> str:
    """Return one way to describe a restaurant."""
    kind = f"{restaurant.get('food', '')} {restaurant['eatType']}".strip()
    article = "an" if kind[0] in "aeiouAEIOU" else "a"
    area = f"in the {restaurant['area']}" if "area" in restaurant else ""
    near = f"near {restaurant['near']}" if "near" in restaurant else ""
    place = " ".join(part for part in (area, near) if part)
    if place and rng.integers(2):
        first = f"{place[0].upper()}{place[1:]}, {restaurant['name']} is {article} {kind}"
    else:
        first = f"{restaurant['name']} is {article} {kind} {place}".strip()
    details = {key: _DETAILS[key] for key in ("priceRange", "rating") if key in restaurant}
    if "familyFriendly" in restaurant:
        details["familyFriendly"] = _DETAILS[restaurant["familyFriendly"]]
    rest = [str(rng.choice(ways)).format(restaurant[key]) for key, ways in details.items()]
    return ". ".join([first, *rest]) + "."


def load(train: int = 600, dev: int = 40, *, seed: int = 0) -> Task:
    """Return the task; equal arguments give equal texts, and no dev prompt is a training prompt.

    Args:
      train: training examples, each with another prompt.
      dev: dev prompts, each with `REFERENCES` texts that may be equal.
      seed: of the draw.
    """
    rng, prompts = np.random.default_rng(seed), {}
    while len(prompts) < train + dev:
        restaurant = _restaurant(rng)
        prompts[", ".join(f"{key}[{value}]" for key, value in restaurant.items())] = restaurant
    rows = list(prompts.items())
    splits = {"train": rows[:train], "dev": [row for row in rows[train:] for _ in range(REFERENCES)]}
    examples = {
        split: Prompts(
            [prompt for prompt, _ in rows],
            [f" {_text(restaurant, rng)}" for _, restaurant in rows],
            [f"restaurants, {split} {number}" for number in range(len(rows))],
        )
        for split, rows in splits.items()
    }
    return Task("restaurants", (), examples["train"], {"dev": examples["dev"]})
