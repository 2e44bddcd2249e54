"""The study's results, claims and page on made-up runs, and its plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcopo_fast.config.reading import load_config

FOLDER = Path(__file__).parents[2] / "examples" / "paper_at_small_scale"
sys.path.insert(0, str(FOLDER))

import claims  # noqa: E402
import erring  # noqa: E402
import outcome  # noqa: E402
import plan  # noqa: E402
import raw  # noqa: E402
import run as command  # noqa: E402

# Results and page ------------------------------------------------------------------------------------------------------------------

HELD_OUT = ("caption_accuracy", "shape_fidelity", "motion_amplitude", "sharpness")
MEASURES = ("toy_vq", "toy_mq", "toy_ta", *HELD_OUT, "motion", "detail", "diversity")
PAIRS = {name: plan.sweep(name)[0] for name in plan.SWEPT}


def sides(
    part: plan.Part, moved: Mapping[str, float], random: np.random.Generator, videos: int | None = None, erring_kind: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An evaluation before, the same each time, and one after, moved by so many standard deviations and some scatter."""
    count = part.prompts * (videos or part.videos)
    scores: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for place, name in enumerate(MEASURES):
        before = np.random.default_rng(place).standard_normal(count)
        before = (before - before.mean()) / before.std()
        after = before + moved.get(name, moved.get("", 0.0)) + 0.2 * random.standard_normal(count)
        for side, values in zip(scores, (before, after)):
            side[name] = {"mean": 0.0, "std": 1.0, "values": values.tolist()}
            side["reward"] = side["erring:White:toy_vq_1"] = {"values": [0.0] * count}
    if erring_kind:  # whose level 0 is the exact score
        for side in scores:
            side |= {f"erring:{erring_kind}:{name}_0": side.pop(name) for name in erring.EXACT}
    return scores


def made(part: plan.Part, out: Path, moved: Mapping[str, Mapping[str, float]]) -> None:
    """Write the files that the commands leave behind for a part, with a given change for each method."""
    random = np.random.default_rng(len(part.name))  # the same each time: one family in twenty has a verdict that is wrong
    for run in plan.runs(part, PAIRS):
        folder = out / "runs" / part.name / run.name
        folder.mkdir(parents=True)
        kind = next((kind for kind in plan.KINDS if f"_{kind}_" in run.method), "")
        before, after = sides(part, moved.get(run.method, {}), random, erring_kind=kind)
        (folder / "evaluation.json").write_text(json.dumps({"before": before, "after": after}))
        lines = [{"step": step, "reward": 0.1 * step, "update2/live": 0.5} for step in range(1, part.iterations + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed in part.seeds if part.scales else ():
        folder = out / "merges" / str(seed) / "evaluations"
        folder.mkdir(parents=True)
        for scale in part.scales:
            before, after = sides(part, {"": scale, "shape_fidelity": -scale}, random, videos=2)
            (folder / "baseline.json").write_text(json.dumps({"scores": before}))
            (folder / f"scale-{scale:g}.json").write_text(json.dumps({"scores": after}))
    for method in part.methods if part.draws else ():
        folder = out / "entropy" / method
        folder.mkdir(parents=True)
        strong = 20.0 if method == "ar_copo" else 0.05
        frames = [{"initial": [strong * (1 + i / 50)], "renoise1": [1.0], "renoise2": [0.1]} for i in range(part.prompts)]
        records = [{"prompt": i, "pivot": p, "frames": frames[i]} for p in (1, 2) for i in range(part.prompts)]
        (folder / "entropy.json").write_text(json.dumps({"records": records}))
    if part.levels:
        (out / "erring.json").write_text("{}")


def small(part: plan.Part) -> plan.Part:
    """With all seeds and fewer videos."""
    return replace(part, prompts=12, videos=2, iterations=3)


def all_made(out: Path, seeds: int = 6) -> raw.Results:
    """Results of every part in which all that the paper says is so."""
    gains = {"ar_copo": {"": 1.0}, "sde_fresh": {"": 0.5}, "sde_unscaled": {"": 0.5}, "neighbor": {"": 0.1}, "ar_copo_unscaled": {}}
    gains["caption_on"] = {"toy_ta": 1.0, "shape_fidelity": -1.0}
    gains["caption_semi"], gains["caption_off"] = {"toy_ta": 0.3}, {"": -1.0}
    gains |= {plan.judged_by("ar_copo", kind, level): {"": 0.8} for kind in plan.KINDS for level in erring.LEVELS}
    for part in plan.PARTS.values():
        part = replace(small(part), seeds=part.seeds[:seeds])
        made(part, out, gains)
        raw.collect(part, out, PAIRS, out / "results")
    return raw.Results(out / "results")


@pytest.fixture(scope="module")
def as_the_paper_says(tmp_path_factory: pytest.TempPathFactory) -> raw.Results:
    """Results of all six seeds."""
    return all_made(tmp_path_factory.mktemp("study"))


def test_results_hold_every_video(tmp_path: Path) -> None:
    part = small(plan.PARTS["methods"])
    made(part, tmp_path, {"ar_copo": {"": 1.0, "toy_mq": 2.0}})
    file = raw.collect(part, tmp_path, PAIRS, tmp_path / "results")
    document = json.loads(file.read_text())
    assert set(document["before"]) == {"0"}, "the same videos before: kept once"
    assert document["plan"] == json.loads(json.dumps(asdict(part)))
    run = document["runs"]["sde_shared-3"]
    kept = json.loads((tmp_path / "runs/methods/sde_shared-3/evaluation.json").read_text())["after"]
    assert list(run["after"]) == list(MEASURES), "without the sum, and what an erring judge gave"
    assert run["after"]["toy_vq"] == pytest.approx(kept["toy_vq"]["values"], rel=6e-4, abs=1e-3)
    assert run["curves"]["update2/live"] == [0.5] * 3 and "objective.clip=0.0015" in run["settings"]
    results = raw.Results(tmp_path / "results")
    cells = results.changes("methods", "ar_copo", "toy_mq")
    assert cells.shape == (6, 12) and cells.mean() == pytest.approx(2, abs=0.5)
    weights, before, after = document["weights"], document["before"]["0"], document["runs"]["ar_copo-0"]["after"]
    total = [sum(weights[name] * np.array(side[name]) for name in weights) for side in (before, after)]
    expected = (total[1] - total[0]).reshape(12, 2).mean(1) / total[0].std()
    assert results.changes("methods", "ar_copo", raw.GAIN)[0] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["methods", "judges", "caption"])
def test_a_result_can_be_committed(name: str, tmp_path: Path) -> None:
    made(plan.PARTS[name], tmp_path, {})
    assert raw.collect(plan.PARTS[name], tmp_path, PAIRS, tmp_path / "results").stat().st_size < 1e6


def test_the_sweep_chooses_by_mean_gain_of_what_was_trained(tmp_path: Path) -> None:
    part = small(plan.PARTS["tune"])
    made(part, tmp_path, {})
    for lr, gain in ((0.5, 2.0), (1, 0.5)):
        for method, moved in (("ar_copo", {"": gain}), ("caption_semi", {"toy_ta": -gain, "toy_vq": 9.0 * gain})):
            pair = plan.sweep(method)[1 if lr == 0.5 else 0]
            for seed in part.seeds:
                before, after = sides(part, moved, np.random.default_rng(seed))
                file = tmp_path / "runs" / "tune" / f"{method}-lr{pair.lr:g}-clip{pair.clip:g}-{seed}" / "evaluation.json"
                file.write_text(json.dumps({"before": before, "after": after}))
    raw.collect(part, tmp_path, {}, tmp_path / "results")
    chosen = raw.Results(tmp_path / "results").chosen()
    assert chosen["ar_copo"] == plan.sweep("ar_copo")[1]
    assert chosen["caption_semi"] not in plan.sweep("caption_semi")[:2], "the caption reward fell there"


def test_claims_hold_where_they_are_so(as_the_paper_says: raw.Results) -> None:
    judged = {each.title: each.verdict for each in claims.judge(as_the_paper_says)}
    assert {*judged.values()} == {"holds"}


class Balanced(HTMLParser):
    """Every opened tag is closed in its order; links go nowhere but beside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """<line/> and the like."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page(as_the_paper_says: raw.Results, tmp_path: Path) -> None:
    results = as_the_paper_says
    judged = outcome.write_outcome(results, tmp_path, quick=False)
    text, tables = ((tmp_path / name).read_text() for name in ("index.html", "tables.md"))
    parser = Balanced()
    parser.feed(text)
    assert not parser.open and not parser.links
    for each in judged:
        assert f"{escape(each.title)}: " in text and f"| {each.title} | {each.verdict} |" in tables
    copo = claims.change(results, claims.COPO)
    assert outcome.figure(copo) in text and outcome.figure(copo) in tables and "rises" in tables
    assert "the former minus the latter" in text and "Rule: The first learns more" in text
    ratio = outcome.figure(next(each for each in judged if each.claim.ratio).tests["pivot 1"].estimate, ratio=True)
    assert 20 < float(ratio.split()[0]) < 26 and ratio in text and ratio in tables
    for folder in (tmp_path / "again", tmp_path):  # from the results alone, and the same each time
        outcome.write_outcome(raw.Results(results.folder), folder, quick=False)
    assert (tmp_path / "again" / "index.html").read_text() == text


@pytest.mark.parametrize("parts", [(), ("methods",)])
def test_page_of_what_is_there(parts: tuple[str, ...], tmp_path: Path) -> None:
    for name in parts:
        made(small(plan.PARTS[name]), tmp_path, {"ar_copo": {"": 1.0}})
        raw.collect(small(plan.PARTS[name]), tmp_path, PAIRS, tmp_path)
    judged = outcome.write_outcome(raw.Results(tmp_path), tmp_path, quick=False)
    assert sum(each.verdict != "not run" for each in judged) == 2 * len(parts)
    assert "The part caption has no result." in (tmp_path / "tables.md").read_text()


def test_no_verdict_from_three_seeds(tmp_path: Path) -> None:
    results = all_made(tmp_path, seeds=3)
    judged = outcome.write_outcome(results, results.folder, quick=True)
    trained = {each.verdict for each in judged if not each.claim.ratio}
    assert trained == {"no verdict"}
    assert outcome.QUICK in (results.folder / "index.html").read_text() and outcome.QUICK in (results.folder / "tables.md").read_text()


# Plan ------------------------------------------------------------------------------------------------------------------------------


def test_every_method_is_swept_with_the_same_budget() -> None:
    part = plan.PARTS["tune"]
    runs = plan.runs(part, {})
    for name in part.known():
        own = [run for run in runs if run.method == name]
        assert len(own) == len(plan.FACTORS) * len(part.seeds) and len({run.pair for run in own}) == len(plan.FACTORS)
    assert {method.tuned_as or name for name, method in plan.METHODS.items()} == set(plan.SWEPT)
    assert not {*part.seeds} & {seed for other in plan.PARTS.values() if other is not part for seed in other.seeds}
    assert len(plan.PARTS["methods"].seeds) >= 6 and plan.PARTS["methods"].prompts * plan.PARTS["methods"].videos == 256
    assert {run.pair.clip for run in runs if run.method == "ar_copo"} > {load_config("toy").objective.clip}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", plan.PARTS)
def test_recipes_take_every_setting(name: str) -> None:
    """And runs train with the pair that was chosen."""
    chosen = {method: plan.Pair(float(f"{1e-4 * (place + 1):g}"), 2e-3) for place, method in enumerate(plan.SWEPT)}
    for part in (plan.PARTS[name], plan.quick(plan.PARTS[name])):
        runs = plan.runs(part, chosen)
        assert len({run.name for run in runs}) == len(runs)
        for run in {run.method: run for run in runs}.values():
            buffer = [] if run.mode == "on_policy" else ["train.buffer=somewhere"]
            config = load_config(run.recipe, [*run.settings, f"name={run.name}", *buffer])
            assert config.optimizer.lr == run.pair.lr and config.evaluation.prompts == part.prompts
            if not part.pairs:
                assert run.pair == chosen[part.known()[run.method].tuned_as or run.method]


def test_a_part_needs_the_sweep() -> None:
    with pytest.raises(plan.UserError, match="controls trains neighbor with what the sweep chose for neighbor.*run --part tune"):
        plan.runs(plan.PARTS["controls"], {})


def test_compute_is_equal() -> None:
    """In videos that are judged and in frames that are replayed; each is counted from the recipe."""
    found = {name: plan.compute_of(method) for name, method in plan.METHODS.items()}
    config = load_config("toy")
    groups = config.rollout.prompts_per_iteration
    assert {work.judged for name, work in found.items() if plan.METHODS[name].mode == "on_policy"} == {groups * config.rollout.group_size}
    replayed = groups * 2 * config.objective.anchors_per_update * len(config.sampler.steps) * config.video.chunk_frames  # type: ignore[attr-defined]
    assert {work.replayed for work in found.values()} == {replayed}
    assert found["caption_semi"].generated == 0 < found["ar_copo"].generated == found["sde_fresh"].generated


@pytest.mark.parametrize("name", plan.PARTS)
def test_jobs_come_after_what_they_need(name: str, tmp_path: Path) -> None:
    for parts in (plan.PARTS, {name: plan.quick(part) for name, part in plan.PARTS.items()}):
        todo = command.jobs(parts[name], PAIRS, tmp_path, parts["methods"])
        names = [job.name for job in todo]
        assert len(set(names)) == len(names) and names
        for place, job in enumerate(todo):
            assert all(names.index(needed) < place for needed in job.after)
            assert job.command()[0] == "-m" and not job.done()


def test_what_was_begun_goes_on_and_what_is_done_stays(tmp_path: Path) -> None:
    part = plan.PARTS["methods"]
    job = next(job for job in command.jobs(part, PAIRS, tmp_path, part) if job.name == "methods-sde_fresh-4")
    assert job.command()[1:3] == ["arcopo_fast.train", "toy_sde_grpo"] and not job.done()
    folder = tmp_path / "runs" / "methods" / "sde_fresh-4"
    folder.mkdir(parents=True)
    assert job.command() == ["-m", "arcopo_fast.train", "--resume", str(folder)] and not job.done()
    (folder / "evaluation.json").write_text("{}")
    assert job.done()


def test_a_failing_job_names_its_log(tmp_path: Path) -> None:
    jobs = [
        command.Job("good", lambda: ["-c", "open(r'%s', 'w').close()" % (tmp_path / "there")], (tmp_path / "there").exists),
        command.Job("bad", lambda: ["-c", "import sys; print('what went wrong'); sys.exit(3)"], lambda: False, ("good",)),
    ]
    with pytest.raises(command.UserError, match=r"bad ended with status 3: what went wrong \(see .*bad.txt\)"):
        command.run_all(jobs, tmp_path, 2)
    assert jobs[0].done()


def test_a_run_that_nothing_teaches_is_resumed(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
tries = pathlib.Path({str(tmp_path / "tries")!r})
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
sys.exit("error: nothing was learned in 10 iterations in a row" if len(tries.read_text()) < 3 else 0)
"""
    command.run_all([command.Job("stuck", lambda: ["-c", code], lambda: False)], tmp_path, 1)
    assert (tmp_path / "tries").read_text() == "xxx"


def test_another_run_of_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = replace(small(plan.PARTS["tune"]), methods=("ar_copo",), seeds=(100,))
    made(part, tmp_path, {})
    monkeypatch.setattr(command, "run_all", lambda *_: None)
    command.run_part(part, part, tmp_path, tmp_path / "results", 1)
    more = replace(part, methods=("ar_copo", "neighbor"))
    made(replace(part, methods=("neighbor",)), tmp_path, {})
    command.run_part(more, part, tmp_path, tmp_path / "results", 1)
    assert raw.Results(tmp_path / "results").methods("tune") == ["ar_copo", "neighbor"], "a method that has come to the library"
    with pytest.raises(command.UserError, match="holds another run ar_copo-lr0.0008-clip0.003-100"):
        command.run_part(replace(more, iterations=9), part, tmp_path, tmp_path / "results", 1)
