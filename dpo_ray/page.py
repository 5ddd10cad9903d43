"""What the reports share: one HTML page that needs no network, its tables, and pictures inside it."""

import base64
import html
import io
import json
from typing import Any

from matplotlib.figure import Figure

BLUE, RED, GREEN, ORANGE, PURPLE, BROWN = "#1f5fa8", "#c0392b", "#2e8b57", "#d98a1f", "#7d5ba6", "#8c6d46"
GREY, PALE = "#7f7f7f", "#bdbdbd"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; }
img { max-width: 100%; }
table { border-collapse: collapse; margin: .5rem 0; } th, td { text-align: left; vertical-align: top;
padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #ddd; } th { font-weight: 600; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; }
"""


def document(title: str, body: str) -> bytes:
    """A whole page; `body` is HTML already, the title is not."""
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
{body}
</body>
</html>
""".encode()


def picture(figure: Figure) -> bytes:
    """As PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def image(png: bytes, meaning: str) -> str:
    """A picture inside the page."""
    return f'<img alt="{html.escape(meaning)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def paragraph(content: str) -> str:
    return f"<p>{html.escape(content)}</p>"


def table(heads: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>{head}\n{body}</table>"


def with_interval(value: Any, low: Any, high: Any) -> str:
    """`0.6 (0.5 to 0.7)`, or the value alone when it has no interval."""
    return text(value) if low is None or high is None else f"{text(value)} ({text(low)} to {text(high)})"


def text(value: Any) -> str:
    """A value as a reader wants it: four digits, no quotes, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
