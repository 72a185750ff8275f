"""Pictures of a run: its curves, what was cut out of it, where its zeros are, and how the search for a ticket went.

``draw`` of each module is a function of records or arrays that returns a matplotlib figure (extra ``plot``), or None
where there is nothing of the kind to draw.
"""

from collections.abc import Callable
from pathlib import Path

from dsee_jax.analysis.pictures import curves, kept, search, sparsity
from dsee_jax.ckpt import kept_units
from dsee_jax.runtime import files


def draw(run: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Draw what there is of a run into PNG files beside its others, and return them; without matplotlib one line says so."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        say("pictures not drawn: pip install 'dsee-jax[plot]'")
        return {}
    records = files.read(run / "metrics.jsonl")
    pictures = {
        "curves": curves.draw(records),
        "kept": kept.draw(kept_units.read(run / "model")),
        "sparsity": sparsity.draw(sparsity.zeros(run / "model")),
        "search": search.draw(records),
    }
    drawn = {name: run / f"{name}.png" for name, figure in pictures.items() if figure is not None}
    for name, file in drawn.items():
        pictures[name].savefig(file, dpi=120)
    return drawn
