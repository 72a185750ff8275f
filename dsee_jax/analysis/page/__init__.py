"""The page of one or several finished runs: one HTML file that loads nothing from elsewhere."""

from collections.abc import Sequence

from dsee_jax.analysis.page import markup, sections
from dsee_jax.analysis.page.markup import tag
from dsee_jax.analysis.page.run_files import RunFigures, read

PAGE = "report.html"
"""The file of the page, in the folder of the (first) run."""

__all__ = ["PAGE", "RunFigures", "read", "render"]


def render(runs: Sequence[RunFigures]) -> str:
    """Return the page of the runs: the colour of a run is the same in every section."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [section(runs) for section in sections.SECTIONS]
    return markup.document(f"{title}: DSEE report", tag("h1", f"Report of {title}"), sections.legend(runs), *body)
