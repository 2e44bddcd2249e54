"""One self-contained HTML page: its style and its skeleton. Readable at the width of a phone, in light and dark."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from arcopo_fast.reports.charts import COLORS


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document; `parts` are HTML, empty ones are left out."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, parts)))


def section(title: str, content: str, note: str = "") -> str:
    """A titled part of a page; `title` is text, `content` and `note` are HTML."""
    return f"<section><h2>{escape(title)}</h2>{f'<p class=note>{note}</p>' if note else ''}{content}</section>"


def table(head: Iterable[str], rows: Iterable[str], style: str = "") -> str:
    """A table that scrolls by itself where the screen is narrow; `head` are texts, `rows` are HTML rows, `style` is a class."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    kind = f' class="{style}"' if style else ""
    return f'<div class="wide"><table{kind}><thead><tr>{titles}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def figures(charts: Iterable[tuple[str, str, str]]) -> str:
    """Charts beside each other, as many as there is room for: (title, note, SVG), texts but for the SVG."""
    shown = [f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>{chart}</figure>" for title, note, chart in charts]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


def warning(title: str, content: str) -> str:
    """Return a warning that must not be overlooked; `title` is text, `content` is HTML."""
    return f'<div class="warning" role="note"><b>{escape(title)}</b>{content}</div>'


def chip(index: int) -> str:
    """The number of a series in its color, from 1."""
    return f'<b class="chip f{index % COLORS}">{index + 1}</b>'


def give_or_take(error: float, digits: int = 3) -> str:
    """Return what follows a number with an error; nothing where that is not known."""
    return f" <small>± {error:.{digits}f}</small>" if math.isfinite(error) else ""


def video(path: Path, label: str, mark: str = "") -> str:
    """A looping, silent video of an mp4 file, embedded, with its label below; `mark` is HTML before the label."""
    source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    label = escape(label)
    return f'<div><video autoplay loop muted playsinline aria-label="{label}" src="{source}"></video><span>{mark}{label}</span></div>'


_STYLE = """
:root { color-scheme: light dark;
  --page: #fcfcfb; --card: #ffffff; --ink: #1c1c1a; --quiet: #63625d; --rule: #e3e2dd; --up: #0f7a4d; --down: #b3261e;
  --s0: #2a78d6; --s1: #c2571a; --s2: #14855f; --s3: #8a52c7; --s4: #a67c00; --s5: #c2306f; --s6: #0b8291; --s7: #6b6a64;
  --raw: #a9c9ee; --warning: #fdf0ee; }
@media (prefers-color-scheme: dark) { :root {
  --page: #161615; --card: #1f1f1d; --ink: #ecebe6; --quiet: #a3a29b; --rule: #363632; --up: #5fd19c; --down: #ff8a80;
  --s0: #6aa8f0; --s1: #ee9159; --s2: #4cc094; --s3: #bd93ee; --s4: #d9b23a; --s5: #f07ba9; --s6: #45bccb; --s7: #a9a8a0;
  --raw: #2f4a6b; --warning: #33201e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; }
h2 { margin: 44px 0 8px; font-size: 20px; }
p { margin: 8px 0; }
.note, .facts, small, figcaption, summary { color: var(--quiet); font-size: 14px; }
.note { max-width: 72ch; }
.result { margin: 14px 0; }
.warning { margin: 14px 0; padding: 10px 16px; max-width: 80ch; background: var(--warning); border-left: 4px solid var(--down); }
.warning ul { margin: 6px 0; padding-left: 20px; }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 2px 22px; max-height: 30vh; padding: 4px 0;
  overflow-y: auto; background: var(--page); font-size: 14px; overflow-wrap: anywhere; }
.series th, .series td { padding-left: 16px; }
.series th:first-child { min-width: 13em; max-width: 20em; padding-left: 0; white-space: normal; overflow-wrap: break-word; }
.series thead th { white-space: normal; vertical-align: bottom; overflow-wrap: normal; }
.chip { display: inline-block; min-width: 20px; margin-right: 6px; padding: 0 5px; border-radius: 4px; color: var(--page);
  font-size: 13px; line-height: 20px; text-align: center; }
.settings td { min-width: 8em; max-width: 24em; white-space: normal; vertical-align: top; overflow-wrap: break-word; }
.number { margin-right: 6px; font-size: 26px; font-weight: 650; white-space: nowrap; }
.wide { overflow-x: auto; }
table { margin-top: 12px; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 0 6px 22px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th:first-child { padding-left: 0; text-align: left; font-weight: 500; }
thead th { color: var(--quiet); font-size: 14px; font-weight: 500; }
tr.group th { padding-top: 18px; color: var(--quiet); font-size: 14px; }
tr.sum * { font-weight: 650; }
.up { color: var(--up); }
.down { color: var(--down); }
.bar { width: 180px; }
.bar i { display: block; height: 10px; min-width: 1px; border-radius: 2px; background: var(--s0); }
figure { margin: 0; }
.videos, .charts { display: grid; gap: 28px; margin-top: 16px; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.videos { grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); }
.videos figcaption { margin-top: 6px; color: var(--ink); }
.rows { display: grid; gap: 24px; margin-top: 16px; }
.rows figcaption { margin-bottom: 6px; color: var(--ink); }
.strip { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.pair span, .strip span { display: block; margin-top: 2px; font-size: 13px; color: var(--quiet); }
video { display: block; width: 100%; border-radius: 4px; background: var(--rule); }
.charts figcaption { min-height: 66px; margin-bottom: 4px; }
.charts b { display: block; color: var(--ink); font-size: 15px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 12px; }
.grid { stroke: var(--rule); stroke-width: 1; }
polyline, .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.raw { stroke: var(--raw); stroke-width: 1.2; }
polyline.thin, polyline.error { fill: none; stroke-width: 1; opacity: 0.5; }
.band { opacity: 0.16; }
.axis { stroke: var(--quiet); stroke-width: 1; }
.parted { fill: var(--warning); }
.s0 { stroke: var(--s0); } .f0 { fill: var(--s0); background: var(--s0); }
.s1 { stroke: var(--s1); } .f1 { fill: var(--s1); background: var(--s1); }
.s2 { stroke: var(--s2); } .f2 { fill: var(--s2); background: var(--s2); }
.s3 { stroke: var(--s3); } .f3 { fill: var(--s3); background: var(--s3); }
.s4 { stroke: var(--s4); } .f4 { fill: var(--s4); background: var(--s4); }
.s5 { stroke: var(--s5); } .f5 { fill: var(--s5); background: var(--s5); }
.s6 { stroke: var(--s6); } .f6 { fill: var(--s6); background: var(--s6); }
.s7 { stroke: var(--s7); } .f7 { fill: var(--s7); background: var(--s7); }
pre { padding: 14px; overflow-x: auto; font-size: 13px; line-height: 1.45;
  background: var(--card); border: 1px solid var(--rule); border-radius: 6px; }
summary { cursor: pointer; }
code { font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 520px) {
  body { padding: 16px 14px 48px; }
  th, td { padding-left: 10px; font-size: 14px; }
  th:first-child { white-space: normal; overflow-wrap: anywhere; }
  td small { display: block; }
  .bar { width: 90px; }
  .charts figcaption { min-height: 0; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
