"""Pictures of a run: training curves, kept heads and neurons, zeros per kernel, and the search for a ticket.

``draw`` of each module takes records or arrays and returns a matplotlib figure (extra ``plot``), or None without any data to
draw.
"""

from collections.abc import Callable
from pathlib import Path

from dsee_jax.analysis.pictures import curves, kept, search, sparsity
from dsee_jax.ckpt import kept_units
from dsee_jax.ckpt.folders import LOG, MODEL
from dsee_jax.runtime import files


def draw(run: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Write the pictures of a run as PNG files into its folder, and return them; without matplotlib, ``say`` takes a line."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        say("pictures not drawn: pip install 'dsee-jax[plot]'")
        return {}
    records = files.read(run / LOG)
    pictures = {
        "curves": curves.draw(records),
        "kept": kept.draw(kept_units.read(run / MODEL)),
        "sparsity": sparsity.draw(sparsity.zeros(run / MODEL)),
        "search": search.draw(records),
    }
    drawn = {name: run / f"{name}.png" for name, figure in pictures.items() if figure is not None}
    for name, file in drawn.items():
        pictures[name].savefig(file, dpi=120)
    return drawn
