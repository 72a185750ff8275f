"""Print the tables of finished runs, draw their pictures, and write a page that compares them."""

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsee_jax.errors import InputError
from dsee_jax.runtime import answer

if TYPE_CHECKING:
    from dsee_jax.analysis.pictures import Zeros
    from dsee_jax.runtime.storage import Place

DESCRIPTION = (
    "Print the scores and costs of a finished run, and write report.html into its folder: one page, for any browser, with "
    "the curves of loss and scores, the stages and costs, the zeros of every kernel, the kept heads and neurons, and the "
    "updates. Several runs share the page of the first. The extra `plot` also draws pictures as PNG files."
)
EXAMPLE = "python -m dsee_jax report runs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help="the output_dir of a finished run")
    parser.add_argument("--html", metavar="FILE", help="the file of the page; default report.html in the first RUN_DIR")
    answer.arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Print the tables, draw the pictures, write the page, and print their paths."""
    from dsee_jax.analysis import page
    from dsee_jax.analysis.pictures import sparsity
    from dsee_jax.ckpt.folders import METRICS
    from dsee_jax.runtime import files, storage

    wanted = answer.wanted(options)
    file = storage.target(options.html, "--html") if options.html else storage.as_output(options.runs[0]) / page.PAGE
    runs = {storage.as_path(run): storage.download(run) for run in options.runs}
    for place, run in runs.items():
        if not (run / METRICS).exists():
            raise InputError(f"{place} is no finished run: it has no {METRICS}")
    # The pictures and the page count the zeros of the same weights.
    zeros = functools.cache(sparsity.zeros)
    shown = [_show(place, run, wanted, zeros) for place, run in runs.items()]
    written = None
    names = [run.absolute().name for run in runs.values()]
    if len(set(names)) < len(names):
        names = [str(place) for place in runs]
    try:
        text = page.render([page.read(run, name, zeros=zeros) for run, name in zip(runs.values(), names, strict=True)])
        files.write_text(file, text)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"page not written: a run is damaged ({type(error).__name__}: {error})"
        if options.html:
            raise InputError(problem) from None
        wanted.say(problem)
    except OSError as error:
        if options.html:
            raise
        wanted.say(f"page not written: {file}: {error.strerror or error}")
    else:
        written = str(file)
        wanted.show(f"page     {file}")
    wanted.give({"runs": shown, "page": written})


def _show(place: "Place", run: Path, wanted: answer.Answer, zeros: "Zeros") -> dict[str, Any]:
    """Print the tables of one run, and draw its pictures; return its results and the paths of the pictures."""
    from dsee_jax.analysis import pictures
    from dsee_jax.ckpt.folders import METRICS, read_json
    from dsee_jax.runtime import storage
    from dsee_jax.train.report import show

    results = read_json(run / METRICS)
    try:
        show(results, place, wanted.show)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{place / METRICS} does not hold the results of a run ({problem}): run train.py again"
        ) from None
    drawn = pictures.draw(run, wanted.say, zeros=zeros) if storage.may_be_written(place) else {}
    for name, file in drawn.items():
        if storage.remote(place):
            storage.upload(file, place / file.name)
        wanted.show(f"{name:8} {place / file.name}")
    return {
        "run": str(place),
        "results": results,
        "pictures": {name: str(place / file.name) for name, file in drawn.items()},
    }
