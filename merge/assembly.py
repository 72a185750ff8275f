"""A merge from its recipe to all that stands around the weights: models opened, vocabularies aligned, plan, card, pictures."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt import tensors
from merge import units
from merge.inputs import lazies, tokenizer
from merge.inputs.sources import Source, open_source
from merge.outputs import card, picture, surroundings
from merge.planning import plan
from merge.recipes import document, recipe
from merge.streaming import engine

PICTURE = "merge_coefficients.png"


class Assembly(NamedTuple):
    """A merge that is ready to be done."""

    recipe: recipe.Recipe
    sources: Mapping[str, Source]  # by reference, their vocabularies aligned
    plan: plan.Plan
    vocabulary: tokenizer.Vocabulary | None
    config: Mapping[str, Any]  # the merged model's config.json
    files: Mapping[str, Path]  # all that is read, by a name for the card


def read(path: str | os.PathLike[str]) -> Assembly:
    """Read a recipe and the headers of its models.

    Raises:
      InputError: whatever does not fit, of the recipe, the models or the files of statistics.
    """
    said = recipe.read(path)
    beside = said.path.absolute().parent if isinstance(said.path, Path) else said.path.parent
    sources = {reference: open_source(reference, beside) for reference in said.references}
    files = {name: file for source in sources.values() for name, file in source.files.items()}
    entries = [entry for part in said.slices for entry in part.models if entry.statistics is not None]
    places = {str(entry.statistics): Path(str(entry.statistics)) for entry in entries}
    files |= places
    statistics = {
        place: {name: lazies.plain(stored) for name, stored in tensors.contents(place).items()}
        for place in places.values()
    }
    words = None
    if said.tokenizer is None:
        tokenizer.check(list(sources.values()))
    else:
        words = tokenizer.build(
            said.tokenizer.source,
            list(sources.values()),
            beside,
            base=said.base_model,
            tokens=said.tokenizer.tokens,
            pad_to_multiple_of=said.tokenizer.pad_to_multiple_of,
        )
        sources = {source.reference: source for source in tokenizer.align(words, list(sources.values()))}
    made = plan.plan(said, sources, statistics)
    kinds = [job.dtype for job in made.jobs if job.method != "copy"]
    config = surroundings.config(
        sources[said.origin].config,
        dtype=max(set(kinds), key=kinds.count) if kinds else None,
        layers=made.layers,
        vocab_size=None if words is None else words.rows,
    )
    return Assembly(said, sources, made, words, config, files)


@contextlib.contextmanager
def hashed(ready: Assembly) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash all that is read in the background; yields what waits for ``{name: SHA-256}``."""
    stopped = threading.Event()

    def go_on(nbytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(surroundings.hashes, ready.files.values(), go_on)

        def digests() -> dict[str, str]:
            found = future.result()
            return {name: found[file] for name, file in ready.files.items()}

        try:
            yield digests
        finally:
            stopped.set()


def surround(ready: Assembly, folder: Path, name: str, extras: engine.Extras, digests: Mapping[str, str]) -> list[str]:
    """Write all but the weights into ``folder``; return lines for the user.

    Args:
      ready: what was merged.
      folder: holds the weights.
      name: of the merged model.
      extras: what the method's look at the whole model gave for each tensor.
      digests: ``{name: SHA-256}`` of every file read.
    """
    said, origin = ready.recipe, ready.sources[ready.recipe.origin]
    options = {key: option.default for key, option in said.method.shared.items()}
    resolved = document.parse(str(said.path), said.text)
    resolved["parameters"] = options | (resolved.get("parameters") or {})
    template = None
    if said.chat_template is not None:
        template = surroundings.chat_template(said.chat_template, [source.folder for source in ready.sources.values()])
    surroundings.write(
        folder,
        origin.folder,
        ready.config,
        tokenizer=None if ready.vocabulary is None else ready.vocabulary.tokenizer,
        template=template,
        card=card.card(
            name,
            method=said.name,
            about=said.method.help,
            models=ready.plan.models,
            base=said.base_model,
            recipe=said.text,
            options=resolved["parameters"],
            digests=digests,
        ),
        recipe=card.recipe_text(resolved, digests),
    )
    return _shares(ready, folder, extras)


def _shares(ready: Assembly, folder: Path, extras: engine.Extras) -> list[str]:
    """Draw what RankMean took from whom, and return the table and where the picture is; nothing for other methods."""
    jobs = [job for job in ready.plan.jobs if "change" in extras[job.name]]
    if not jobs:
        return []
    where = units.of([job.name for job in jobs], jobs[0].options["unit"])
    found = {unit: extras[job.name] for job in jobs if (unit := where[job.name]) is not None}
    names = sorted(found, key=units.natural)
    shares, changes = (np.stack([np.asarray(found[name][key]) for name in names]) for key in ("coefficients", "change"))
    table = picture.table(names, ready.plan.models, shares, changes)
    return [table, picture.heatmap(folder / PICTURE, names, ready.plan.models, shares, changes)]
