"""HTML and SVG elements, in which every text is escaped, and the frame of a page that loads nothing and runs nothing."""

import html
from typing import Any

from dsee_jax.runtime import console


class Markup(str):
    """Text that is markup already."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """Return an element; a child that is no `Markup` is escaped, and so is every attribute.

    Names of attributes have ``_`` for ``-`` and may end in ``_`` (``class_``). An attribute None is left out.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: Any) -> Markup:
    """Return children one after the other; lists are joined too, and None is nothing."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(*child))
        elif child is not None:
            parts.append(child if isinstance(child, Markup) else escape(child))
    return Markup("".join(parts))


def escape(value: Any) -> str:
    """Return a value as text without markup and control characters; a float with six digits at most."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return html.escape(console.plain(text), quote=True)


def document(title: str, *body: Any) -> str:
    """Return a complete page. Its policy forbids scripts and requests, also where a browser would run them."""
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        ),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *body)), lang='en')}\n"


_STYLE = (
    """
:root {
  --page: #ffffff; --card: #f6f7f9; --line: #d9dce1; --grid: #e6e8ec; --text: #16181d; --soft: #565d6b;
  --low: #eef1f5; --high: #083f70; --on-high: #ffffff;
  --run-0: #0072b2; --run-1: #c44f00; --run-2: #00805d; --run-3: #a8437f; --run-4: #6a5acd; --run-5: #8a6d00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #191d23; --line: #353b45; --grid: #2a2f38; --text: #eceef2; --soft: #a5adba;
    --low: #252b34; --high: #5aa9e0; --on-high: #0c1116;
    --run-0: #56b4e9; --run-1: #f08a4b; --run-2: #2fc79b; --run-3: #e69ac7; --run-4: #a99bf0; --run-5: #e3c04d;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
h3 { font-size: .95rem; margin: 1rem 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 68ch; margin: .25rem 0 .75rem; color: var(--soft); }
.runs { list-style: none; margin: 0; padding: 0; display: grid; gap: .35rem; }
.runs .key { white-space: normal; overflow-wrap: anywhere; }
.key { display: inline-flex; gap: .5rem; align-items: center; }
.charts { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
summary { cursor: pointer; margin: .75rem 0; }
summary h3 { display: inline; }
.small { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
figure { margin: 0; padding: .75rem; min-width: 0; }
figure, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figcaption { font-size: .875rem; font-weight: 600; margin-bottom: .35rem; overflow-wrap: anywhere; }
.small figcaption { font-size: .75rem; font-weight: 400; line-height: 1.3; }
figure svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin-top: .5rem; }
.fit { width: fit-content; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--run-0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
table.wide { min-width: 100%; }
.wrap tbody > tr > * { white-space: normal; min-width: 8.5rem; }
svg { flex: none; }
th, td { padding: .4rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; }
.number { text-align: right; }
.heat td, .heat thead th { padding: .3rem .35rem; text-align: center; min-width: 2.1rem; }
.heat td { background: color-mix(in oklab, var(--high) calc(100% * var(--share)), var(--low)); border: 1px solid var(--card); }
.heat thead th:first-child { text-align: left; }
.heat td.on { color: var(--on-high); }
.heat td.none { background: none; }
text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); } .stage { stroke: var(--soft); stroke-dasharray: 2 3; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.point { stroke: transparent; stroke-width: 10; } .point:hover { stroke: var(--grid); }
.cell { fill: var(--high); } .track { fill: var(--low); }
"""
    + "".join(f".run-{run} {{ --run: var(--run-{run}); }}\n" for run in range(6))
    + """
.curve { stroke: var(--run); } .point, .dots { fill: var(--run); }
"""
)
