"""A merge from its recipe to its output files: opened models, aligned vocabularies, plan, model card, heat map."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt import companions, tensors
from dsee_jax.runtime import console
from dsee_jax.runtime.storage import Place
from merge import units
from merge.inputs import lazy, naming, tokenizer
from merge.inputs.sources import Source, located, moved, open_source
from merge.outputs import card, heatmap, metadata
from merge.planning import plan
from merge.recipes import recipe, reference
from merge.streaming import engine


class Prepared(NamedTuple):
    """A merge that is ready to run."""

    recipe: recipe.Recipe
    sources: Mapping[str, Source]  # by reference, with aligned vocabularies
    plan: plan.Plan
    vocabulary: tokenizer.Vocabulary | None
    config: Mapping[str, Any]  # the merged model's config.json
    files: Mapping[str, Path]  # every input file, by its name in the card
    companions: Mapping[str, Path]  # the files beside the weights that are copied, by their paths in the output
    inputs: tuple[Path, ...]  # every input file


def read(path: str | os.PathLike[str], *, seed: int | None = None, head: str | None = None) -> Prepared:
    """Read a recipe and the headers of its models.

    Args:
      path: of the recipe.
      seed: replaces the seed of the recipe; None: its own.
      head: the model whose head is kept where heads differ, see `merge.planning.heads.separate`.

    Raises:
      InputError: the recipe, a model or a file of statistics is invalid.
    """
    parsed = recipe.read(path, seed=seed)
    beside = _beside(parsed)
    opened = [open_source(reference, beside) for reference in parsed.references]
    unified, notes = naming.unified(opened)
    sources = {source.reference: source for source in unified}
    files = {name: file for source in sources.values() for name, file in source.files.items()}
    entries = [entry for part in parsed.slices for entry in part.models if entry.statistics is not None]
    statistics_files = {str(entry.statistics): Path(str(entry.statistics)) for entry in entries}
    files |= statistics_files
    statistics = {
        file: naming.spelled({name: lazy.plain(stored) for name, stored in tensors.contents(file).items()}, unified[0])
        for file in statistics_files.values()
    }
    vocabulary, tokenizers = None, []
    if parsed.tokenizer is None:
        tokenizer.check(list(sources.values()))
    else:
        vocabulary = tokenizer.build(
            parsed.tokenizer.source,
            list(sources.values()),
            beside,
            base=parsed.base_model,
            tokens=parsed.tokenizer.tokens,
            pad_to_multiple_of=parsed.tokenizer.pad_to_multiple_of,
        )
        tokenizers = [file for source in sources.values() for file in _tokenizer_files(source.tokenizer)]
        if parsed.tokenizer.source not in ("base", "union"):
            tokenizers += _tokenizer_files(located(parsed.tokenizer.source, beside)[1])
        sources = {source.reference: source for source in tokenizer.align(vocabulary, list(sources.values()))}
    merge_plan = plan.plan(parsed, sources, statistics, head=head)
    merge_plan = merge_plan._replace(notes=(*notes, *merge_plan.notes))
    dtypes = [job.dtype for job in merge_plan.jobs if job.method != "copy"]
    config = metadata.config(
        _with(sources[parsed.origin].config, merge_plan.fields),
        dtype=max(dict.fromkeys(dtypes), key=dtypes.count) if dtypes else None,
        layers=merge_plan.layers,
        vocab_size=None if vocabulary is None else vocabulary.rows,
    )
    copied, warnings = metadata.copied(list(sources.values()))
    merge_plan = merge_plan._replace(warnings=(*merge_plan.warnings, *warnings))
    inputs = tuple(dict.fromkeys([*files.values(), *engine.files(merge_plan), *tokenizers, *copied.values()]))
    return Prepared(parsed, sources, merge_plan, vocabulary, config, files, copied, inputs)


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in companions.tokenizer_files(folder)]


def _with(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with other fields, and without those that are None."""
    return {key: value for key, value in {**config, **fields}.items() if key not in fields or value is not None}


@contextlib.contextmanager
def input_digests(ready: Prepared, known: Mapping[Path, str]) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash all inputs in the background; yields a function that waits for ``{name: SHA-256}`` and returns it.

    Args:
      ready: the merge.
      known: the SHA-256 of files that are not read again.
    """
    stopped = threading.Event()

    def raise_if_stopped(nbytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError

    with ThreadPoolExecutor(1) as pool:
        unread = [file for file in ready.files.values() if file not in known]
        future = pool.submit(metadata.hashes, unread, raise_if_stopped)

        def digests() -> dict[str, str]:
            hashes = {**known, **future.result()}
            return {name: hashes[file] for name, file in ready.files.items()}

        try:
            yield digests
        finally:
            stopped.set()


def write_metadata(
    ready: Prepared, folder: Path, out: Place, extras: engine.Extras, digests: Mapping[str, str]
) -> list[str]:
    """Write every file beside the weights into ``folder``; return lines for the user.

    Args:
      ready: the merge.
      folder: the folder of the merged weights.
      out: the place of the folder when it is complete.
      extras: from `merge.streaming.engine.run`.
      digests: ``{name: SHA-256}`` of every input file.
    """
    parsed = ready.recipe
    resolved = recipe.resolved(parsed)
    template = None
    if parsed.chat_template is not None:
        template = metadata.chat_template(parsed.chat_template, [source.tokenizer for source in ready.sources.values()])
    metadata.write(
        folder,
        ready.companions,
        ready.config,
        tokenizer=None if ready.vocabulary is None else ready.vocabulary.tokenizer,
        template=template,
        card=card.card(
            out.name,
            method=parsed.name,
            about=parsed.method.help,
            models=ready.plan.models,
            base=parsed.base_model,
            recipe=parsed.text,
            options=resolved["parameters"],
            digests=digests,
        ),
        recipe=card.recipe_text(_moved(parsed, resolved, out), digests),
    )
    return _shares(ready, folder, out, extras)


def _beside(parsed: recipe.Recipe) -> Place:
    return parsed.path.absolute().parent if isinstance(parsed.path, Path) else parsed.path.parent


def _moved(parsed: recipe.Recipe, content: Mapping[str, Any], out: Place) -> dict[str, Any]:
    """Return a recipe's content for a recipe in the folder ``out``, with the local paths written anew."""

    def written(place: Place) -> str:
        if not isinstance(place, Path):
            return str(place)
        if isinstance(out, Path) and place.absolute().anchor == out.absolute().anchor:
            return os.path.relpath(place.absolute(), out.absolute())
        return str(place.absolute())

    return reference.mapped(
        content,
        lambda model: moved(model, _beside(parsed), written),
        lambda file: written(recipe.statistics_file(parsed.path, file)),
    )


def _shares(ready: Prepared, folder: Path, out: Place, extras: engine.Extras) -> list[str]:
    """Draw RankMean's heat map; return its table and the picture's path, or nothing for other methods."""
    jobs = [job for job in ready.plan.jobs if "change" in extras[job.name]]
    if not jobs:
        return []
    where = units.of([job.name for job in jobs], jobs[0].options["unit"])
    groups = {group: extras[job.name] for job in jobs if (group := where[job.name]) is not None}
    names = sorted(groups, key=units.natural)
    shares, changes = (
        np.stack([np.asarray(groups[name][key]) for name in names]) for key in ("coefficients", "change")
    )
    table = heatmap.table(names, ready.plan.models, shares, changes)
    drawn = heatmap.heatmap(folder / heatmap.PICTURE, names, ready.plan.models, shares, changes)
    return [table, f"heat map  {console.plain(str(out / heatmap.PICTURE)) if drawn else heatmap.NOT_DRAWN}"]
