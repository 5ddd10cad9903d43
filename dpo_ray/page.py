"""What the reports share: one HTML page that needs no network, its sections, tables and pictures.

It reads well on a screen, light or dark, on a phone and on paper. It holds no script, and its own policy forbids the
browser every request. Everything here takes plain text and escapes it, unless it says that it takes HTML.
"""

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, GREEN, ORANGE, PURPLE, BROWN = "#1f5fa8", "#c0392b", "#2e8b57", "#d98a1f", "#7d5ba6", "#8c6d46"
GREY, PALE = "#7f7f7f", "#bdbdbd"

LONG_TEXT = 500
"""Characters of a text that are shown at once; a longer one is folded."""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --quiet: #57606a; --line: #d8dee4; --soft: #f5f7f9;
  --link: #0b57a4; --mark: #e6f0fa; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #171717; --ink: #e4e7eb; --quiet: #a4adb8; --line: #363d46; --soft: #1d2227; --link: #7db8f5;
    --mark: #20344a; }
  img { filter: invert(.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; margin: 0 auto;
  padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .75rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; } h4 { font-size: .9rem; margin: 0 0 .35rem; }
p { margin: .6rem 0; max-width: 46rem; }
a { color: var(--link); }
.about, figcaption, small, .note { color: var(--quiet); }
.about { margin: .25rem 0 0; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0 0; padding: 0;
  font-size: .9rem; }
nav a { text-decoration: none; } nav a:hover, nav a:focus-visible { text-decoration: underline; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; width: max-content; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line);
  max-width: 24rem; }
th { font-weight: 600; color: var(--quiet); vertical-align: bottom; }
figure { margin: 0; } figcaption { font-size: .85rem; margin-top: .25rem; max-width: 46rem; }
img { display: block; max-width: 100%; height: auto; }
.sheet img { min-width: 44rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem;
  margin: 1rem 0; }
.panels figure { max-width: 30rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.numbers div { background: var(--soft); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; }
.numbers dt { font-size: .85rem; color: var(--quiet); }
.numbers dd { margin: 0; font-size: 1.25rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.numbers small { display: block; font-size: .8rem; font-weight: 400; }
pre, .said { background: var(--soft); border-radius: .4rem; padding: .8rem; margin: .5rem 0; }
pre { font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-x: auto; overflow-wrap: normal; }
.said { white-space: pre-wrap; font-size: .92rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .5rem 1rem; }
.example { border: 1px solid var(--line); border-radius: .4rem; padding: .8rem 1rem; margin: 1rem 0; }
.example h3 { margin-top: 0; }
.preferred { background: var(--mark); }
summary { cursor: pointer; color: var(--link); } .said summary { color: inherit; }
.more { color: var(--link); } details[open] .cut { display: none; }
@page { margin: 14mm; }
@media print {
  html { font-size: 9.5pt; } body { max-width: none; padding: 0; }
  nav { display: none; }
  a, summary, .more { color: inherit; text-decoration: none; }
  h2, h3, h4, .about { break-after: avoid; }
  figure, table, tr, .numbers div, .example { break-inside: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; } .sheet img { min-width: 0; }
  table { width: auto; font-size: 8pt; overflow-wrap: break-word; } th, td { padding-right: .6rem; }
  pre { white-space: pre-wrap; overflow: visible; overflow-wrap: anywhere; }
  .panels, .sides { grid-template-columns: 1fr 1fr; gap: 1rem; }
  details::details-content { content-visibility: visible; block-size: auto; }
  details .cut { display: none; } summary { list-style: none; }
}
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'"
"""What the page may load: the pictures inside it and this style; nothing from a network, and no script."""


class Panel(NamedTuple):
    """A picture of one thing."""

    title: str
    caption: str
    """What is seen, in words: it stands below the picture, and for it where it cannot be seen."""
    draw: Callable[[Axes], None]
    height: float = 3.7
    """Inches, at a width of 5.4."""


def document(title: str, body: str, about: str = "") -> bytes:
    """A whole page with a list of its sections.

    Args:
        body: HTML. Every `<h2>` in it begins a section, whose id is made of the heading.
        about: A line below the title.
    """
    sections, contents = _sections(body)
    under = f'\n<p class="about">{html.escape(about)}</p>' if about else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>{under}
{contents}</header>
<main>
{sections}
</main>
</body>
</html>
""".encode()


def _sections(body: str) -> tuple[str, str]:
    """The body with its sections marked, and the list of links to them."""
    first, *rest = re.split(r"(?=<h2>)", body)
    parts, links, taken = [first] if first.strip() else [], [], set[str]()
    for part in rest:
        heading = html.unescape(part[len("<h2>") : part.index("</h2>")])
        name = _anchor(heading)
        while name in taken:
            name += "-again"
        taken.add(name)
        parts.append(f'<section id="{name}">\n{part.rstrip()}\n</section>')
        links.append(f'<li><a href="#{name}">{html.escape(heading)}</a></li>')
    contents = f'<nav aria-label="Contents"><ul>\n{"".join(links)}\n</ul></nav>\n' if len(links) > 1 else ""
    return "\n".join(parts), contents


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"


def section(title: str, *parts: str) -> str:
    """A section of the page; the parts are HTML, empty ones are left out."""
    return "\n".join([f"<h2>{html.escape(title)}</h2>", *filter(None, parts)])


def subsection(title: str, *parts: str) -> str:
    """A part of a section; nothing where it would be empty."""
    filled = [part for part in parts if part]
    return "\n".join([f"<h3>{html.escape(title)}</h3>", *filled]) if filled else ""


def picture(figure: Figure) -> bytes:
    """As PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def sheet(panels: Sequence[Panel]) -> bytes:
    """All panels in one PNG, two in a row."""
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    every = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, panel in zip(every, panels, strict=False):
        _drawn(axes, panel)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    return picture(figure)


def panels_side_by_side(panels: Sequence[Panel]) -> str:
    """Each panel as a picture of its own with its caption: two in a row, on a phone one."""
    return f'<div class="panels">\n{"".join(map(_figure, panels))}</div>' if panels else ""


def _figure(panel: Panel) -> str:
    figure = Figure(figsize=(5.4, panel.height), layout="constrained")
    _drawn(figure.subplots(), panel)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    shown = _image(buffer.getvalue(), f"{panel.title}. {panel.caption}")
    return f"<figure>{shown}<figcaption>{html.escape(panel.caption)}</figcaption></figure>\n"


def _drawn(axes: Axes, panel: Panel) -> None:
    panel.draw(axes)
    axes.set_title(panel.title, fontweight="bold", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def image(png: bytes, meaning: str) -> str:
    """A large picture inside the page; on a phone it scrolls in its own box, since its words would be too small."""
    return f'<div class="wide sheet">{_image(png, meaning)}</div>'


def _image(png: bytes, meaning: str) -> str:
    return f'<img alt="{html.escape(meaning)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def paragraph(content: str) -> str:
    return f"<p>{html.escape(content)}</p>"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """One that is wider than the page scrolls in its own box."""
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    head = f"<thead><tr>{head}</tr></thead>" if heads else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table>{head}\n<tbody>{body}</tbody></table></div>'


def numbers(items: Sequence[tuple[str, str, str]]) -> str:
    """The numbers that matter most: name, value, and what is to be known of it (may be empty)."""
    cells = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        + (f"<small>{html.escape(note)}</small>" if note else "")
        + "</dd></div>"
        for name, value, note in items
    )
    return f'<dl class="numbers">{"".join(cells)}</dl>'


def folded(title: str, content: str) -> str:
    """HTML that is shown on request, and on paper."""
    return f"<details><summary>{html.escape(title)}</summary>\n{content}\n</details>"


def said(content: str, *, is_preferred: bool = False) -> str:
    """A text by a person or a model, with its lines; the rest of a long one is folded."""
    kind = "said preferred" if is_preferred else "said"
    if len(content) <= LONG_TEXT:
        return f'<div class="{kind}">{html.escape(content)}</div>'
    begin = html.escape(content[: LONG_TEXT * 4 // 5].rstrip())
    shown = f'<span class="cut">{begin} … <span class="more">all {len(content)} characters</span></span>'
    return f'<div class="{kind}"><details><summary>{shown}</summary>{html.escape(content)}</details></div>'


def with_interval(value: Any, low: Any, high: Any) -> str:
    """`0.6 (0.5 to 0.7)`, or the value alone when it has no interval."""
    return text(value) if low is None or high is None else f"{text(value)} ({text(low)} to {text(high)})"


def estimate(found: dict[str, Any] | None, name: str = "value") -> str:
    """`with_interval` of an object with `low` and `high`; a dash for None."""
    return "-" if found is None else with_interval(found.get(name), found.get("low"), found.get("high"))


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def percent_with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """`60.5% (56.2% to 64.7%)`; the value alone when it has no interval."""
    return percent(value) if low is None or high is None else f"{percent(value)} ({percent(low)} to {percent(high)})"


def duration(seconds: float) -> str:
    """In the unit that leaves a number a person can read."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"


def text(value: Any) -> str:
    """A value as a reader wants it: four digits, no quotes, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
