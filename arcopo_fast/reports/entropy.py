"""The report of a study of which noise decides: Markdown, a page that needs nothing else, and a picture of all pivots."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from arcopo_fast.evaluation.study import MEASURES, RATIO, Study, figure_path, summarize
from arcopo_fast.reports.html import page, section, stylesheet, table
from arcopo_fast.reports.table import markdown_table
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.video import stack_png


def write_results(study: Study, name: str) -> str:
    """entropy.md, entropy.html and entropy.png from what is known; returns the Markdown."""
    summary = summarize(study.records)
    text = markdown(study, summary)
    atomic_write(study.directory / "entropy.md", text)
    pictures = [path for entry in summary if (path := figure_path(study.directory, entry["pivot"])).is_file()]
    if pictures:
        stack_png(study.directory / "entropy.png", pictures)
    atomic_write(study.directory / "entropy.html", html(study, summary, name))
    return text


def noises(summary: Sequence[dict[str, Any]]) -> list[str]:
    """All noises of a study, "initial" first; the first chunk may have other steps than the rest."""
    names = [name for entry in summary for name in entry["video"] if name != RATIO]
    return sorted(dict.fromkeys(names), key=lambda name: (name != "initial", len(name), name))


def spoken(name: str) -> str:
    """Return the name of a noise in words."""
    return "initial noise" if name == "initial" else name.replace("renoise", "re-noise ")


def number(value: dict[str, float | None] | None) -> str:
    """To two digits of its error, or to three where that is not known; a dash for what there is none of."""
    mean, error = (value["mean"], value["error"]) if value else (None, None)
    if mean is None:
        return "–"
    if not error:
        return f"{mean:.3g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def _about(study: Study, summary: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Return what was done, and a sentence about re-noises where there are none."""
    counts = sorted({entry["prompts"] for entry in summary})
    prompts = f"{counts[0]} prompt{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} prompts"
    draws = study.settings["draws"]
    errors = "prompts" if counts[-1] > 1 else "draws"
    spread = f", ± one standard error over {errors}" if counts[-1] > 1 or draws > 1 else ""
    done = f"Mean squared change per element when one noise tensor is replaced; {prompts}, {draws} draw{'s' * (draws > 1)} each{spread}."
    missing = ""
    if noises(summary) == ["initial"]:
        kind, steps = study.settings["sampler.kind"], len(study.settings["sampler.steps"])
        why = "of a single step" if steps == 1 else f"of kind {kind}, which is deterministic after the first draw"
        missing = f"There is no re-noise to compare with: the sampler is {why}."
    return done, missing


def markdown(study: Study, summary: Sequence[dict[str, Any]]) -> str:
    """entropy.md: a table for each measure, a line for each pivot."""
    names = noises(summary)
    parts = ["# Which noise decides", *filter(None, _about(study, summary))]
    for measure, title in MEASURES.items():
        rows = [[str(entry["pivot"]), *(number(entry[measure].get(name)) for name in [*names, RATIO])] for entry in summary]
        parts += [f"## {title}", markdown_table(["pivot", *map(spoken, names), RATIO], rows).rstrip()]
    return "\n\n".join([*parts, "Ratio: the initial noise's change over that of the largest re-noise."]) + "\n"


def html(study: Study, summary: Sequence[dict[str, Any]], name: str) -> str:
    """entropy.html: the ratio, a bar for each change, all numbers, and the frames of the first prompt for each pivot."""
    done, missing = _about(study, summary)
    ratios = [entry["video"][RATIO]["mean"] for entry in summary if entry["video"][RATIO]["mean"] is not None]
    result = ""
    if ratios:
        low, high = (f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in (min(ratios), max(ratios)))
        result = (
            f'<p class="result"><span class="number">{low if low == high else f"{low} to {high}"} ×</span> '
            "as much changes, by pivot, with the chunk's initial noise as with its most important re-noise</p>"
        )
    steps = ", ".join(f"{step:g}" for step in study.settings["sampler.steps"])
    facts = f"generator {study.settings['generator.checkpoint']} · adapter {study.settings['adapter']} · steps {steps}"
    numbers = "".join(f"<h3>{title}</h3>{_number_table(summary, measure)}" for measure, title in MEASURES.items())
    return page(
        f"Which noise decides - {name}",
        [
            f"<style>{stylesheet('entropy.css')}</style><header><h1>Which noise decides: {escape(name)}</h1>{result}"
            f'<p class="facts">{escape(facts)}<br>{escape(done)} {escape(missing)}</p></header>',
            section("Change by what is replaced", _bars(summary), f"{MEASURES['video']}. All bars have one scale."),
            section("Frames", "".join(_figures(study)), _FRAMES_NOTE),
            section("All numbers", numbers, "Ratio: the initial noise's change over that of the largest re-noise."),
        ],
    )


_FRAMES_NOTE = (
    "One prompt, the first draw. The top row is the unchanged video; each row below has one noise tensor of the pivot chunk replaced, "
    "everything else is frozen. The bar lies above the frames of the pivot chunk."
)


def _bars(summary: Sequence[dict[str, Any]]) -> str:
    measured = [(entry, name, entry["video"][name]) for entry in summary for name in entry["video"] if name != RATIO]
    most = max(value["mean"] for *_, value in measured) or 1.0
    rows, pivot = [], None
    for entry, name, value in measured:
        if entry["pivot"] != pivot:
            pivot = entry["pivot"]
            ratio = entry["video"][RATIO]
            heading = f"Pivot {pivot}" + (f", ratio {number(ratio)}" if ratio["mean"] is not None else "")
            rows.append(f'<tr class="group"><th colspan="3" scope="rowgroup">{heading}</th></tr>')
        width = 100 * value["mean"] / most
        rows.append(
            f'<tr><th scope="row">{spoken(name)}</th><td>{number(value)}</td><td class="bar"><i style="width:{width:.2f}%"></i></td></tr>'
        )
    return f'<div class="bars">{table(["", "change", ""], rows)}</div>'


def _number_table(summary: Sequence[dict[str, Any]], measure: str) -> str:
    names = [*noises(summary), RATIO]
    rows = []
    for entry in summary:
        cells = "".join(f"<td>{number(entry[measure].get(name))}</td>" for name in names)
        rows.append(f'<tr><th scope="row">{entry["pivot"]}</th>{cells}</tr>')
    return table(["pivot", *map(spoken, names)], rows)


def _figures(study: Study) -> Iterator[str]:
    """Return the sheet of frames of each pivot with its rows and columns named; rows are as high as the sheet's, whatever the width."""
    for record in study.records:
        path = figure_path(study.directory, record["pivot"])
        if "times" not in record or not path.is_file():
            continue
        labels = ["unchanged", *(spoken(name) for name in record["video"])]
        tags = ["b" if column in record["marked"] else "span" for column in range(len(record["times"]))]
        times = "".join(f"<{tag}>{time}</{tag}>" for tag, time in zip(tags, record["times"]))
        width = f"min-width:{58 * len(tags)}px"
        yield (
            f'<figure class="frames"><figcaption><b>Pivot {record["pivot"]}</b> {escape(record["text"])}</figcaption><div>'
            f'<div class="names">{"".join(f"<span>{label}</span>" for label in labels)}</div><div class="scroll">'
            f'<div class="times" style="{width};grid-template-columns:repeat({len(tags)},1fr)">{times}</div>'
            f'<img style="{width}" alt="Frames of pivot {record["pivot"]}: {", ".join(labels)}" '
            f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></div></div></figure>'
        )
