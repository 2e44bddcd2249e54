"""One self-contained HTML page: its style and its skeleton. Readable at the width of a phone, in light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path

from arcopo_fast.evaluation.changes import Change
from arcopo_fast.reports.charts import COLORS
from arcopo_fast.reports.table import plain, plus_minus, signed


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document; `parts` are HTML, empty ones are left out."""
    return _PAGE.format(title=escape(title), style=stylesheet("page.css"), body="\n".join(filter(None, parts)))


def stylesheet(name: str) -> str:
    """Return a style of this package's pages, for their <style>."""
    return "\n" + (files("arcopo_fast.reports") / name).read_text(encoding="utf-8")


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


def legend(labels: Iterable[str]) -> str:
    """Return the legend of series, each in its color."""
    entries = "".join(f"<span>{chip(index)}{escape(label)}</span>" for index, label in enumerate(labels))
    return f'<p class="legend">{entries}</p>'


def give_or_take(error: float, digits: int = 3) -> str:
    """Return what follows a number with an error; nothing where that is not known."""
    text = plus_minus(error, digits).strip()
    return text and f" <small>{text}</small>"


def change_cells(change: Change) -> str:
    """Return the cells of a table for a change: before, after, the change with its error, and the change in standard deviations."""
    return (
        f"<td>{plain(change.before)}</td><td>{plain(change.after)}</td>"
        f'<td class="{("", "up", "down")[change.direction]}">{signed(change.change)}{give_or_take(change.error)}</td>'
        f"<td>{signed(change.in_spreads, 2)}</td>"
    )


def video(path: Path, label: str, mark: str = "") -> str:
    """A looping, silent video of an mp4 file, embedded, with its label below; `mark` is HTML before the label."""
    source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    label = escape(label)
    return f'<div><video autoplay loop muted playsinline aria-label="{label}" src="{source}"></video><span>{mark}{label}</span></div>'


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
