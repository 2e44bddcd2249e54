"""The page and the tables that put each outcome beside the claim, made from results alone; runs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from claims import FIRST, MORE, SECOND, Outcome, change, judge
from inference import Estimate, Tested
from plan import JUDGED, KINDS, METHODS, PARTS, compute_of, judged_by
from raw import GAIN, NEUTRAL, Results

from arcopo_fast.reports.charts import Spread, line_chart
from arcopo_fast.reports.html import figures, page, section, table, warning
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.metrics import TOTAL

TRAINED = ("methods", "controls", "published", "caption")
TITLE = "The paper's findings at small scale"
QUICK = "A quick run: it shows that everything works. It proves nothing, and there are no verdicts."
HOW = (
    "Changes are after minus before on the same prompts and noises, in standard deviations of a video before training, with 95 % intervals "
    "for other seeds and other prompts (crossed random effects, Student's t). p is corrected for all tests of the claims together (Holm); "
    "other tables show intervals and no verdicts."
)


class Grid(NamedTuple):
    """A table of texts. rows: each with its heading first."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """Return it for the page."""
        rows = [
            f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>' for row in self.rows
        ]
        return table(self.head, rows)

    def markdown(self) -> str:
        """Return it for tables.md."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return f"## {self.title}\n\n{self.note}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_outcome(results: Results, folder: Path, *, quick: bool) -> list[Outcome]:
    """Write index.html and tables.md to a folder; return the judged claims. quick: say that so little proves nothing."""
    outcomes = judge(results)
    grids = [
        grid
        for grid in (claim_grid(outcomes), *change_grids(results), merge_grid(results), sweep_grid(results), compute_grid())
        if grid.rows
    ]
    absent = [f"The part {name} has no result." for name in PARTS if name not in results.parts]
    body = [
        f'<header><h1>{escape(TITLE)}</h1><p class="facts">The toy world of arcopo_fast. {escape(HOW)}</p></header>',
        warning(QUICK, "") if quick else "",
        "".join(f"<p>{escape(line)}</p>" for line in absent),
        section("Claims", "".join(map(_claim, outcomes))),
        section(
            "Gain against the error of the judge", judge_charts(results), "Bands: 95 % intervals. Level: in standard deviations of a video."
        ),
        section("Training", training_charts(results), "Mean over seeds."),
        *(section(grid.title, grid.html(), escape(grid.note)) for grid in grids[1:]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "index.html", page(TITLE, body))
    lines = [f"# {TITLE}: results", *([QUICK] if quick else []), HOW, *absent, *(grid.markdown() for grid in grids)]
    atomic_write(folder / "tables.md", "\n\n".join(lines))
    return outcomes


# Texts -----------------------------------------------------------------------------------------------------------------------------


def figure(estimate: Estimate, *, ratio: bool = False) -> str:
    """Return a mean with its interval, as in +0.93 [+0.55, +1.31]. ratio: it is the logarithm of one."""

    def text(value: float) -> str:
        return f"{math.exp(value):.3g}" if ratio else f"{value:+.2f}"

    low, high = estimate.interval
    return f"{text(estimate.mean)} [{text(low)}, {text(high)}]" if math.isfinite(low) else text(estimate.mean)


def labels(outcome: Outcome) -> dict[str, str]:
    """Return what the page calls a claim's tests."""
    titles = [_title(*where) for where in outcome.claim.needs]
    named = {FIRST: titles[0], SECOND: titles[-1], MORE: "the former minus the latter"}
    return {name: named.get(name, name) for name in outcome.tests}


def verdict(tested: Tested) -> str:
    """Return a test's verdict in words."""
    return {"equivalent": f"equivalent within ±{tested.margin:g}", "too few": "no verdict: too few"}.get(tested.verdict, tested.verdict)


def _title(part: str, method: str) -> str:
    known = PARTS[part].known()
    return known[method].title if method in known else method


def _p(p: float) -> str:
    return "" if not math.isfinite(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


# Claims ----------------------------------------------------------------------------------------------------------------------------

_CLASSES = {"holds": "up", "opposite": "down"}


def _claim(outcome: Outcome) -> str:
    named, ratio = labels(outcome), outcome.claim.ratio
    rows = [
        [named[name], figure(test.estimate, ratio=ratio), verdict(test), _p(test.p), _units(test.estimate, ratio)]
        for name, test in outcome.tests.items()
    ]
    shown = Grid("", "", ["", "figure and interval", "verdict", "p", "prompts" if ratio else "each seed"], rows).html() if rows else ""
    return (
        f'<article><h3>{escape(outcome.title)}: <span class="{_CLASSES.get(outcome.verdict, "")}">{outcome.verdict}</span></h3>'
        f'<p class="note">{escape(outcome.claim.source)}</p><p class="note">Rule: {escape(_rule(outcome))}</p>{shown}</article>'
    )


def _rule(outcome: Outcome) -> str:
    return " ".join((outcome.claim.rule.__doc__ or "Every test has the same sure sign.").split())


def _units(estimate: Estimate, ratio: bool) -> str:
    return str(len(estimate.by_unit)) if ratio else ", ".join(f"{value:+.2f}" for value in estimate.by_unit)


def claim_grid(outcomes: Sequence[Outcome]) -> Grid:
    """Return every claim with its verdict and its tests, in a cell each."""
    rows = []
    for outcome in outcomes:
        named = labels(outcome)
        tests = [
            f"{named[name]}: {figure(test.estimate, ratio=outcome.claim.ratio)}, {verdict(test)}" for name, test in outcome.tests.items()
        ]
        rows.append([outcome.title, outcome.verdict, "; ".join(tests)])
    return Grid("Claims", "The rules are in claims.py.", ["claim", "verdict", "changes"], rows)


# Other tables ----------------------------------------------------------------------------------------------------------------------


def change_grids(results: Results) -> list[Grid]:
    """Return every measure of every method, part by part."""
    grids = []
    for part in TRAINED:
        methods = [method for method in results.methods(part) if not method.startswith("merge_")]
        names = list(dict.fromkeys(name for method in methods for name in results.measures(part, method)))
        rows = [[_title(part, method), *(figure(change(results, (part, method), name)) for name in names)] for method in methods]
        note = f"All changes. {GAIN}: weighted sum of the exact rewards. Of {' and '.join(NEUTRAL)} neither more nor less is better."
        grids.append(Grid(PARTS[part].title, note, ["", *names], rows))
    return grids


def merge_grid(results: Results) -> Grid:
    """Return the merges by scale, measure by measure, against the untrained generator."""
    methods = [method for method in results.methods("caption") if method.startswith("merge_")]
    names = results.measures("caption", methods[0]) if methods else []
    rows = [[method.removeprefix("merge_"), *(figure(change(results, ("caption", method), name)) for name in names)] for method in methods]
    note = "The semi-on-policy adapter trained on the caption reward alone, whole, and so much of the AR-CoPO adapter."
    return Grid("Merging", note, ["scale", *names], rows)


def sweep_grid(results: Results) -> Grid:
    """Return what each pair of learning rate and clip gained, and what the clip let through in the second update."""
    document, rows = results.parts.get("tune", {"runs": {}}), []
    for method in results.methods("tune"):
        own = [run for run in document["runs"].values() if run["method"] == method]
        for lr, clip in dict.fromkeys((run["lr"], run["clip"]) for run in own):
            named = [run for run in own if (run["lr"], run["clip"]) == (lr, clip)]
            gains = ", ".join(f"{value:+.3f}" for value in document["gains"][f"{method} {lr:g} {clip:g}"])
            live = [value for run in named for value in run["curves"].get("update2/live", []) if value is not None]
            chosen = "chosen" if results.chosen().get(method) == (lr, clip) else ""
            rows.append([METHODS[method].title, f"{lr:g}", f"{clip:g}", gains, f"{np.mean(live):.2f}" if live else "", chosen])
    note = "Gain of what was trained on, for each seed; live: the share of ratios in the second update that the clip lets through."
    return Grid("Learning rate and clip", note, ["method", "learning rate", "clip", "gain", "live", ""], rows)


def compute_grid() -> Grid:
    """Return what an iteration of each method costs, from the recipes."""
    rows = [[method.title, *(f"{value:g}" for value in compute_of(method))] for method in METHODS.values()]
    note = (
        "An iteration: videos that are judged, and latent frames x denoising steps that are generated (mean over pivots) and replayed with "
        "gradient. On stored rollouts, 100 groups of 12 videos are generated and judged before the run."
    )
    return Grid("Compute", note, ["method", "judged", "generated", "replayed"], rows)


# Charts ----------------------------------------------------------------------------------------------------------------------------


def judge_charts(results: Results) -> str:
    """Return a chart of gain against level for each kind of error."""
    charts = []
    for kind in KINDS:
        series, spreads = {}, {}
        for base in JUDGED:
            levels = [level for level in (0.0, *PARTS["judges"].levels) if judged_by(base, kind, level) in results.methods("judges")]
            estimates = [change(results, ("judges", judged_by(base, kind, level))) for level in levels]
            label = METHODS[base].title.split(",")[0]
            series[label] = [(level, estimate.mean) for level, estimate in zip(levels, estimates)]
            band = [(level, *estimate.interval) for level, estimate in zip(levels, estimates) if math.isfinite(estimate.error)]
            spreads[label] = Spread(band, [])
        if any(series.values()):
            charts.append((kind, "", line_chart(series, title=f"Gain, {kind.lower()} error", spreads=spreads, x_label="level")))
    return figures(charts)


def training_charts(results: Results) -> str:
    """Return, for each part, the reward and the live fraction over iterations."""
    charts = []
    for part in TRAINED:
        for name, title in ((TOTAL, "reward"), ("update2/live", "live fraction of the second update")):
            curves = {method: results.curve(part, method, name) for method in results.methods(part)}
            series = {method: list(enumerate(curve, start=1)) for method, curve in curves.items() if curve}
            if series:
                charts.append((PARTS[part].title, title, line_chart(series, title=title, smooth=len(next(iter(series.values()))) > 20)))
    return figures(charts)
