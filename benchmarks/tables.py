"""The cases of an iteration as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.iteration import STAGES
from benchmarks.results import OURS


def merged(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cases in which the engine and the reference path were measured apart, as one each; the reference alone is left out."""
    alone = {case["case"]: case for case in cases if OURS not in case["variants"]}
    together = []
    for ours in (dict(case) for case in cases if OURS in case["variants"]):
        theirs = alone.get(ours["case"])
        if theirs is not None:
            ours["variants"] = {**ours["variants"], **theirs["variants"]}
            ratio = theirs["variants"]["reference"]["median"] / ours["variants"][OURS]["median"]
            ours["ratios"] = {**ours["ratios"], "reference": ratio}
            ours["tokens_per_second"] = {**ours["tokens_per_second"], **theirs["tokens_per_second"]}
            rows = [{row["stage"]: row for row in one["stages"]} for one in (theirs, ours)]
            ours["stages"] = [rows[0].get(stage, {}) | rows[1].get(stage, {}) for stage in STAGES if stage in rows[0] | rows[1]]
            ours["extrapolated"] = theirs["extrapolated"]
        together.append(ours)
    return sorted(together, key=lambda case: (1, 0) if "varied" in case else (0, case["pivot"]))


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report, {"environment", "ceilings", "cases"}, of a full-size one {"kernels"} too."""
    environment, ceilings, cases = report["environment"], report["ceilings"], report["cases"]
    matmul, bandwidth = ceilings["matmul"] / 1e12, ceilings["bandwidth"] / 1e12
    pivoted, swept = ([case for case in cases if ("varied" in case) == varied] for varied in (False, True))
    lines = [
        f"# One AR-CoPO iteration{', ' + pivoted[0]['workload'] if pivoted else ''}",
        "",
        f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}, {environment['date']}. Ceilings, measured",
        f"in the same run: matrix product {matmul:.4g} TFLOP/s, copy {bandwidth:.4g} TB/s. Floor: FLOP over the one plus bytes between the",
        "products over the other (`arcopo_fast/planning/work.py`). MFU: FLOP a second over the matrix product's. Seconds are medians.",
    ]
    if cut := next((case["settings"] for case in pivoted), None):
        together = "all" if cut["micro_batch"] is None else cut["micro_batch"]
        lines += [
            f"The engine denoised {cut['branches_per_wave']} branches at a time, decoded {cut['decode_branches']}, and replayed {together} "
            "(anchor, step) pairs together."
        ]
    if pivoted:
        lines += ["", "| pivot | engine | reference | ratio | tokens/s | MFU | of floor | pages | planned | K/V | peak memory |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
        lines += [_total_row(f"{case['pivot']} of {case['chunks']}", case) for case in pivoted]
    if len(pivoted) > 1:
        lines.append(_average_row(pivoted))
    for one in pivoted:
        lines += ["", f"## Pivot {one['pivot']} of {one['chunks']}", ""]
        lines += ["| stage | engine | reference | ratio | GFLOP | MFU | of floor |", "|---|---|---|---|---|---|---|"]
        lines += [_stage_row(row) for row in one["stages"]]
    if note := next((case["extrapolated"] for case in cases if "extrapolated" in case), None):
        lines += [
            "",
            f"The reference path ran {note['measured_branches']} of {note['of']} branches. Of its stages, {', '.join(note['stages'])} are",
        ]
        lines += [f"extrapolated, times {note['of'] / note['measured_branches']:g}; the others, *other* among them, are not scaled."]
    for one in cases:
        lines += [line for problem in one.get("problems", []) for line in ("", f"**Not as planned**, {one['case']}: {problem}.")]
    if "decode" not in {row["stage"] for row in cases[0]["stages"]}:
        lines += ["", "Without the VAE and the rewards: diffusers is not installed here. Advantages were random numbers."]
    if agreements := [case["agreement"] for case in pivoted if "agreement" in case]:
        worst = {name: max(agreement[name] for agreement in agreements) for name in agreements[0]}
        lines += [
            "",
            "Error ratio of the engine to the reference path: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()),
        ]
    lines += _swept(swept) if swept else []
    for name, found in report.get("kernels", {}).items():
        lines += _kernels(name, found)
    return "\n".join(lines) + "\n"


def _swept(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        "## How cost grows",
        "",
        "| workload | engine | tokens/s | MFU | of floor | pages | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        rate, ours = case["tokens_per_second"][OURS], case["variants"][OURS]["median"]
        lines.append(
            f"| {case['case']} | {results.duration(ours)} | {rate:.4g} | {_percent(case['utilisation'])} | "
            f"{_percent(case['of_floor'])} | {case['memory']['pages']} | {_gib(case['memory'].get('peak_bytes'))} |"
        )
    return lines


def _kernels(name: str, found: Mapping[str, Any]) -> list[str]:
    lines = ["", f"## Kernels of the {name}", "", f"{results.duration(found['seconds'])}, in {found['busy']:.1%} of which they run."]
    lines += ["", "| kernel | calls | seconds | share |", "|---|---|---|---|"]
    rows = (f"`{row['name']}` | {row['calls']} | {results.duration(row['seconds'])} | {row['share']:.1%}" for row in found["kernels"])
    return lines + [f"| {row} |" for row in rows]


def _total_row(label: str, one: Mapping[str, Any]) -> str:
    ours, reference = one["variants"][OURS]["median"], one["variants"].get("reference", {}).get("median")
    held = one["memory"]
    kv, peak = _gib(held["kv_bytes"]), _gib(held.get("peak_bytes"))
    rate = one["tokens_per_second"][OURS]
    return (
        f"| {label} | {results.duration(ours)} | {_seconds(reference)} | {_times(reference, ours)} | {rate:.4g} | "
        f"{_percent(one['utilisation'])} | {_percent(one['of_floor'])} | {held['pages']} | "
        f"{held['prefix_pages']} + {held['planned_pages'] - held['prefix_pages']} | {kv} | {peak} |"
    )


def _average_row(cases: Sequence[Mapping[str, Any]]) -> str:
    """Over all pivots; the ratio and the reference's time over those at which it was measured."""
    both = [case for case in cases if "reference" in case["variants"]]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    ours = mean([case["variants"][OURS]["median"] for case in cases])
    floor, flops = mean([case["floor"] for case in cases]), mean([case["flops"] for case in cases])
    reference = mean([case["variants"]["reference"]["median"] for case in both]) if both else None
    of_both = mean([case["variants"][OURS]["median"] for case in both]) if both else 1.0
    rate = cases[0]["tokens_per_second"][OURS] * cases[0]["variants"][OURS]["median"] / ours
    matmul = cases[0]["flops"] / cases[0]["utilisation"] / cases[0]["variants"][OURS]["median"]
    return (
        f"| average | {results.duration(ours)} | {_seconds(reference)} | {_times(reference, of_both)} | {rate:.4g} | "
        f"{_percent(flops / ours / matmul)} | {_percent(floor / ours)} | | | | |"
    )


def _stage_row(row: Mapping[str, Any]) -> str:
    ours, reference = row.get(OURS), row.get("reference")
    work = f"{row['flops'] / 1e9:.4g}" if row.get("flops") else "-"
    figures = f"{_seconds(ours)} | {_seconds(reference)} | {_times(reference, ours)} | {work}"
    return f"| {row['stage']} | {figures} | {_percent(row.get('utilisation'))} | {_percent(row.get('of_floor'))} |"


def _seconds(value: float | None) -> str:
    return "-" if value is None else results.duration(value)


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.3g} GiB"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _times(reference: float | None, ours: float | None) -> str:
    return f"{reference / ours:.2f}x" if reference and ours else "-"
