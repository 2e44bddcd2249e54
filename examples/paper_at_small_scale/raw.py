"""A part's result: one file with every video's scores before and after every run, and its curves. Small enough to be committed.

    {"part": ..., "plan": {...}, "weights": {...}, "before": {"0": {measure: [...]}, ...},
     "runs": {name: {"method", "seed", "lr", "clip", "settings", "before": "0", "after": {measure: [...]}, "curves": {name: [...]}}},
     "gains": {...}, "chosen": {method: [lr, clip]}, "scales": {...}, "entropy": {method: [records]}}

Videos stand prompt by prompt. Runs with the same step list have the same videos before, so these are kept once. A merge is a run whose
method is merge_SCALE. `gains` are those of a sweep, `chosen` the pair of the largest, `scales` say how large a judge's errors were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plan import CAPTION_ONLY, METHODS, Pair, Part, runs

from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation.looks import DETAIL, MOTION
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.metrics import TOTAL, read_metrics

GAIN = "gain"
"""The weighted sum of the exact rewards, with the weights of the recipe toy, whatever a run was trained on."""
CAPTION = "toy_ta"
NEUTRAL = (MOTION, DETAIL)
"""Measures of which neither more nor less is better; of all others more is."""
CURVES = (TOTAL, "update1/live", "update2/live", "update2/ratio_std")


class Results:
    """All results that are committed, or lie in another folder of the same form."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob("*.json")):
            document = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(document, dict) and document.get("part") == file.stem:
                self.parts[file.stem] = document

    def chosen(self) -> dict[str, Pair]:
        """Return the pair that the sweep chose for each method; empty before the sweep."""
        return {name: Pair(*pair) for name, pair in self.parts.get("tune", {}).get("chosen", {}).items()}

    def methods(self, part: str) -> list[str]:
        """Return the methods that the part has runs of, in the order of its runs."""
        return list(dict.fromkeys(run["method"] for run in self.parts.get(part, {}).get("runs", {}).values()))

    def measures(self, part: str, method: str) -> list[str]:
        """Return what was measured, `GAIN` first."""
        return [GAIN, *(name for name in self._runs(part, method)[0]["after"])]

    def changes(self, part: str, method: str, measure: str) -> NDArray[np.float64]:
        """Return each run's change, [seeds, prompts], mean over a prompt's videos, in standard deviations of a video before training.

        Where videos do not vary before, it is the plain change.
        """
        document = self.parts[part]
        cells = []
        for run in self._runs(part, method):
            before = values(document["before"][run["before"]], measure, document["weights"])
            after = values(run["after"], measure, document["weights"])
            spread = float(np.nanstd(before)) or 1.0
            cells.append(((after - before) / spread).reshape(document["plan"]["prompts"], -1).mean(axis=1))
        return np.array(cells)

    def curve(self, part: str, method: str, name: str) -> list[float]:
        """Return a curve's mean over seeds; empty where nothing was logged. An iteration without a value counts as 0."""
        curves = [curve for run in self._runs(part, method) if any(curve := run["curves"].get(name, []))]
        return np.array([[value or 0.0 for value in curve] for curve in curves]).mean(axis=0).tolist() if curves else []

    def _runs(self, part: str, method: str) -> list[dict[str, Any]]:
        found = [run for run in self.parts[part]["runs"].values() if run["method"] == method]
        return sorted(found, key=lambda run: run["seed"])


def values(scores: Mapping[str, Sequence[float | None]], measure: str, weights: Mapping[str, float]) -> NDArray[np.float64]:
    """Return a measure of every video, NaN where it failed."""
    if measure == GAIN:
        return np.sum([weight * np.array(scores[name], dtype=float) for name, weight in weights.items()], axis=0)
    return np.array(scores[measure], dtype=float)


# Writing ---------------------------------------------------------------------------------------------------------------------------


def collect(part: Part, out: Path, chosen: Mapping[str, Pair], folder: Path) -> Path:
    """Write the result of a part whose jobs are done, and return its file. out: where they left what they made."""
    document: dict[str, Any] = {
        "part": part.name,
        "plan": asdict(part),
        "weights": {name: weight for name, weight in load_config("toy").rewards.items() if weight},
        "before": {},
        "runs": {},
    }
    for run in runs(part, chosen):
        folder_of_run = out / "runs" / part.name / run.name
        evaluation = _read(folder_of_run / "evaluation.json")
        records = read_metrics(folder_of_run)
        curves = {name: [_short(record.get(name)) for record in records] for name in CURVES}
        about = {"method": run.method, "seed": run.seed, "lr": run.pair.lr, "clip": run.pair.clip, "settings": run.settings}
        document["runs"][run.name] = about | _sides(document, evaluation["before"], evaluation["after"]) | {"curves": curves}
    for scale in part.scales:
        for seed in part.seeds:
            kept = out / "merges" / str(seed) / "evaluations"
            sides = [_read(kept / name)["scores"] for name in ("baseline.json", f"scale-{scale:g}.json")]
            document["runs"][f"merge_{scale:g}-{seed}"] = {"method": f"merge_{scale:g}", "seed": seed, "curves": {}} | _sides(
                document, *sides
            )
    if part.pairs:
        gains = swept_gains(document)
        document["gains"] = {
            f"{method} {pair.lr:g} {pair.clip:g}": found for method, pairs in gains.items() for pair, found in pairs.items()
        }
        document["chosen"] = {name: max(pairs, key=lambda pair: float(np.mean(pairs[pair]))) for name, pairs in gains.items()}
    if part.levels:
        document["scales"] = _read(out / "erring.json")
    if part.draws:
        document["entropy"] = {name: _read(out / "entropy" / name / "entropy.json")["records"] for name in part.known()}
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{part.name}.json", json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n")
    return folder / f"{part.name}.json"


def swept_gains(document: Mapping[str, Any]) -> dict[str, dict[Pair, list[float]]]:
    """Return each method's gains of what it was trained on, by pair and seed, in standard deviations of a video before."""
    gains: dict[str, dict[Pair, list[float]]] = {}
    for run in document["runs"].values():
        trained = {CAPTION: 1.0} if METHODS[run["method"]].settings[:1] == (CAPTION_ONLY,) else document["weights"]
        before, after = (values(side, GAIN, trained) for side in (document["before"][run["before"]], run["after"]))
        gain = float(np.nanmean(after - before)) / (float(np.nanstd(before)) or 1.0)
        gains.setdefault(run["method"], {}).setdefault(Pair(run["lr"], run["clip"]), []).append(gain)
    return gains


def _sides(document: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the two sides of a run; those before go to the document, unless equal ones are there."""
    first, second = (
        {kept: [_short(value) for value in score["values"]] for name, score in side.items() if (kept := _kept(name))}
        for side in (before, after)
    )
    known = document["before"]
    key = next((key for key, side in known.items() if side == first), str(len(known)))
    known[key] = first
    return {"before": key, "after": second}


def _kept(name: str) -> str:
    """Return what a score is called here; nothing for the sum, which is of what was trained on, and for what a judge that errs gave."""
    exact = name.split(":")[-1].removesuffix("_0") if name.endswith("_0") else ""
    return exact if name.startswith("erring:") else "" if name == TOTAL else name


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
