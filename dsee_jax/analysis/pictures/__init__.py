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

Zeros = Callable[[Path], sparsity.Zeros]
"""The function that counts the zeros of a model; a caller that counts them for more than one purpose may keep its results."""


def draw(run: Path, say: Callable[[str], None], *, zeros: Zeros = sparsity.zeros) -> dict[str, Path]:
    """Write the pictures of a run as PNG files into its folder, and return them.

    ``say`` takes a line where matplotlib is not installed, the log of the run is damaged, or the folder takes no files.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        say("pictures not drawn: pip install 'dsee-jax[plot]'")
        return {}
    pictures = {
        "curves": lambda: curves.draw(files.read(run / LOG)),
        "kept": lambda: kept.draw(kept_units.read(run / MODEL)),
        "sparsity": lambda: sparsity.draw(zeros(run / MODEL)),
        "search": lambda: search.draw(files.read(run / LOG)),
    }
    drawn: dict[str, Path] = {}
    for name, picture in pictures.items():
        file = run / f"{name}.png"
        try:
            if (figure := picture()) is not None:
                figure.savefig(file, dpi=120)
                drawn[name] = file
        except OSError as error:
            say(f"{name} not drawn: {file}: {error.strerror}")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            say(f"{name} not drawn: {run} is damaged ({type(error).__name__}: {error})")
    return drawn
