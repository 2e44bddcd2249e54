"""From finished runs to the page that puts each outcome beside the paper's claim.

Reads what the library's commands left behind: evaluation.json of the runs, sweep.json of the merges, entropy.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import claims
from claims import Claim, Scores

from arcopo_fast.reports.charts import line_chart
from arcopo_fast.reports.html import page, section, table
from arcopo_fast.storage.atomic import atomic_write

CAPTION = "toy_ta"
METHODS = {
    "ar_copo": "AR-CoPO",
    "sde_shared": "SDE-GRPO, shared initial noise",
    "sde_fresh": "SDE-GRPO, fresh initial noise",
    "semi_on_policy": "AR-CoPO, semi-on-policy",
    "caption_on_policy": "caption reward alone, on-policy",
    "caption_semi_on_policy": "caption reward alone, semi-on-policy",
    "caption_off_policy": "caption reward alone, off-policy",
}
EXPLANATIONS = Path(__file__).parent / "explanations.json"
"""By a claim's title: why we believe that it does not hold here, and what was tried."""


class Results:
    """What lies under `out`."""

    def __init__(self, out: Path, seeds: Sequence[int]) -> None:
        self.out = out
        self.seeds = seeds

    def evaluations(self, method: str) -> list[tuple[Scores, Scores]]:
        """(before, after) of each seed."""
        documents = [self._read(f"runs/{method}-{seed}/evaluation.json") for seed in self.seeds]
        return [(document["before"], document["after"]) for document in documents]

    def sweeps(self) -> list[dict[str, Any]]:
        return [self._read(f"merges/{seed}/sweep.json") for seed in self.seeds]

    def entropy(self) -> list[dict[str, Any]]:
        return self._read("entropy/entropy.json")["summary"]

    def _read(self, name: str) -> Any:
        return json.loads((self.out / name).read_text(encoding="utf-8"))


def judge(results: Results) -> list[Claim]:
    """Every claim, with its verdict."""
    copo, shared, fresh = (results.evaluations(method) for method in ("ar_copo", "sde_shared", "sde_fresh"))
    on, semi, off = (results.evaluations(f"caption_{mode}") for mode in ("on_policy", "semi_on_policy", "off_policy"))
    rest = [name for name in on[0][0] if name not in ("reward", CAPTION)]

    def both(evaluations: Sequence[tuple[Scores, Scores]]) -> tuple[claims.Shift, claims.Shift]:
        return claims.shift(evaluations, [CAPTION]), claims.shift(evaluations, rest)

    reward = ["reward"]
    ratios = [(entry["frames"]["ratio"]["mean"], entry["frames"]["ratio"]["error"] or 0.0) for entry in results.entropy()]
    scales, inside, outside = merged_scores(results.sweeps())
    return [
        claims.learns_where_frozen_noise_does_not(
            claims.shift(copo, reward), claims.shift(shared, reward), claims.difference(copo, shared, reward)
        ),
        claims.fresh_noise_helps(claims.shift(fresh, reward), claims.shift(shared, reward), claims.difference(fresh, shared, reward)),
        claims.initial_noise_dominates(ratios),
        claims.semi_on_policy_does_not_hack(both(on), both(semi), claims.difference(semi, on, rest)),
        claims.off_policy_collapses(both(off), both(semi), claims.difference(off, semi, rest)),
        claims.scale_trades(scales, inside, outside),
    ]


def merged_scores(sweeps: Sequence[dict[str, Any]]) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """Scales, and by seed and scale the in-domain and the out-of-domain score."""
    scales = [point["scale"] for point in sweeps[0]["scales"]]
    inside, outside = (
        [[point["scores"][name]["mean"] for point in sweep["scales"]] for sweep in sweeps] for name in ("reward", "held_out")
    )
    return scales, inside, outside


def write_outcome(out: Path, seeds: Sequence[int], *, quick: bool) -> list[Claim]:
    """Write index.html and results.json; returns the judged claims. quick: say that so little proves nothing."""
    results = Results(out, seeds)
    judged = judge(results)
    tables = {method: _measures(results.evaluations(method)) for method in METHODS}
    document = {
        "claims": [asdict(claim) for claim in judged],
        "changes": {method: {name: asdict(shift) for name, shift in measures.items()} for method, measures in tables.items()},
        "chosen_scales": [sweep["chosen"] for sweep in results.sweeps()],
    }
    atomic_write(out / "results.json", json.dumps(document, indent=2) + "\n")
    explained = json.loads(EXPLANATIONS.read_text(encoding="utf-8")) if EXPLANATIONS.is_file() else {}
    intro = (
        "<header><h1>The paper's findings at small scale</h1>"
        '<p class="facts">The toy world of arcopo_fast, '
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}. Changes are after minus before on the same prompts and noises, in standard deviations "
        "of a video before training, ± one standard error over seeds and videos, each seed's in brackets.</p></header>"
    )
    warning = "<p><b>A quick run: it shows that everything works, and its outcomes mean nothing.</b></p>" if quick else ""
    body = [
        intro,
        warning,
        section("Claims", "".join(_claim(claim, explained.get(claim.title, "")) for claim in judged)),
        section("All changes", _change_table(tables), "Metrics that the method was trained on and others alike."),
        section("The merge", _merge_chart(results.sweeps()), _chosen(results.sweeps())),
        section("More", _links(out, seeds)),
    ]
    atomic_write(out / "index.html", page("The paper's findings at small scale", body))
    return judged


def _measures(evaluations: Sequence[tuple[Scores, Scores]]) -> dict[str, claims.Shift]:
    return {name: claims.shift(evaluations, [name]) for name in evaluations[0][0]}


_CLASSES = {"reproduced": "up", "not reproduced": "", "opposite": "down"}


def _claim(claim: Claim, explanation: str) -> str:
    why = f"<p>{escape(explanation)}</p>" if explanation and claim.verdict != "reproduced" else ""
    return (
        f'<article><h3>{escape(claim.title)}: <span class="{_CLASSES[claim.verdict]}">{claim.verdict}</span></h3>'
        f'<p class="note">The paper: {escape(claim.paper)}</p><p>Here: {escape(claim.found)}</p>{why}</article>'
    )


def _change_table(tables: dict[str, dict[str, claims.Shift]]) -> str:
    names = list(dict.fromkeys(name for measures in tables.values() for name in measures))
    rows = []
    for method, measures in tables.items():
        cells = []
        for name in names:
            shift = measures.get(name)
            direction = {1: "up", -1: "down", 0: ""}[shift.direction] if shift else ""
            cells.append(f'<td class="{direction}">{f"{shift.mean:+.2f} <small>± {shift.error:.2f}</small>" if shift else ""}</td>')
        rows.append(f'<tr><th scope="row">{escape(METHODS[method])}</th>{"".join(cells)}</tr>')
    return table(["", *names], rows)


def _merge_chart(sweeps: Sequence[dict[str, Any]]) -> str:
    scales, inside, outside = merged_scores(sweeps)
    charts = []
    sides = (("In-domain: the weighted reward", inside, "reward"), ("Out-of-domain: mean held-out metric", outside, "held_out"))
    for title, by_seed, name in sides:
        base = sum(sweep["baseline"][name]["mean"] for sweep in sweeps) / len(sweeps)
        series = {f"seed {index}": list(zip(scales, values)) for index, values in enumerate(by_seed)}
        series["before"] = [(scale, base) for scale in scales]
        chart = line_chart(series, title=title, x_label="scale")
        charts.append(f"<figure><figcaption><b>{title}</b></figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(charts)}</div>'


def _chosen(sweeps: Sequence[dict[str, Any]]) -> str:
    chosen = ", ".join("none" if sweep["chosen"] is None else f"{sweep['chosen']:g}" for sweep in sweeps)
    return f"Scale that the dual criterion chooses, by seed: {chosen}."


def _links(out: Path, seeds: Sequence[int]) -> str:
    targets = {
        "methods.html": "AR-CoPO and SDE-GRPO: curves, tables, videos",
        "caption.html": "the caption reward alone: curves, tables, videos",
        "entropy/entropy.html": "which noise decides: frames",
        **{f"merges/{seed}/sweep.html": f"merge sweep of seed {seed}" for seed in seeds},
    }
    items = [f'<li><a href="{target}">{escape(text)}</a></li>' for target, text in targets.items() if (out / target).is_file()]
    return f"<ul>{''.join(items)}</ul>"
