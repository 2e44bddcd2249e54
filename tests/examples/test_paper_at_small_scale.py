"""The rules that judge the paper's claims, on made-up numbers, and the page on made-up results."""

from __future__ import annotations

import json
import statistics
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rewards import load_reward

FOLDER = Path(__file__).parents[2] / "examples" / "paper_at_small_scale"
sys.path.insert(0, str(FOLDER))

import claims  # noqa: E402
import outcome  # noqa: E402
import run as command  # noqa: E402
from claims import Shift  # noqa: E402

UP, FLAT, DOWN = Shift(1.0, 0.2, (1.0,)), Shift(0.1, 0.2, (0.1,)), Shift(-1.0, 0.2, (-1.0,))


def evaluation(offset: float = 0.0, videos: int = 24, **offsets: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Before and after by an offset in standard deviations, with some scatter."""
    before, after = {}, {}
    for name in ("reward", "toy_vq", "toy_mq", "toy_ta", "shape_fidelity"):
        values = torch.randn(videos, dtype=torch.float64)
        moved = values + values.std(correction=0) * (offsets.get(name, offset) + 0.1 * torch.randn(videos, dtype=torch.float64))
        for side, numbers in ((before, values), (after, moved)):
            side[name] = {"mean": numbers.mean().item(), "std": numbers.std(correction=0).item(), "values": numbers.tolist()}
    return before, after


def test_shift() -> None:
    seeds = [evaluation(reward=1.0), evaluation(reward=1.0), evaluation(reward=1.6)]
    shift = claims.shift(seeds, ["reward"])
    expected = []
    columns = []
    for before, after in seeds:
        change = torch.tensor(after["reward"]["values"]) - torch.tensor(before["reward"]["values"])
        columns.append(change / before["reward"]["std"])
        expected.append(columns[-1].mean().item())
    assert shift.by_seed == pytest.approx(expected) and shift.mean == pytest.approx(sum(expected) / 3)
    over_videos = torch.stack(columns).mean(0)
    error = (torch.tensor(expected).var() / 3 + over_videos.var() / len(over_videos)).sqrt().item()
    assert shift.error == pytest.approx(error, rel=1e-6) and shift.direction == 1
    both = claims.shift(seeds, ["reward", "toy_mq"])
    assert both.mean == pytest.approx((shift.mean + claims.shift(seeds, ["toy_mq"]).mean) / 2)
    assert claims.shift([evaluation()], ["toy_vq"]).direction == 0 or abs(claims.shift([evaluation()], ["toy_vq"]).mean) < 0.2


def test_difference_is_paired_by_seed_and_video() -> None:
    first = [evaluation(reward=0.5) for _ in range(3)]
    second = [(before, {name: dict(score) for name, score in after.items()}) for before, after in first]
    for _, after in second:
        after["reward"]["values"] = [value - 0.25 for value in after["reward"]["values"]]
    gap = claims.difference(first, second, ["reward"])
    expected = [0.25 / before["reward"]["std"] for before, _ in first]
    assert gap.by_seed == pytest.approx(expected) and gap.mean == pytest.approx(statistics.mean(expected)) and gap.direction == 1
    assert gap.error == pytest.approx(statistics.stdev(expected) / 3**0.5, rel=1e-6), "videos change alike"
    assert claims.difference(first, first, ["reward"]).mean == 0


@pytest.mark.parametrize(
    ("copo", "shared", "verdict"),
    [
        (UP, FLAT, "reproduced"),
        (UP, DOWN, "reproduced"),
        (UP, UP, "not reproduced"),
        (FLAT, UP, "opposite"),
        (FLAT, FLAT, "not reproduced"),
    ],
)
def test_learning(copo: Shift, shared: Shift, verdict: str) -> None:
    assert claims.learns_where_frozen_noise_does_not(copo, shared, UP).verdict == verdict


def test_other_verdicts() -> None:
    assert claims.fresh_noise_helps(UP, FLAT, UP).verdict == "reproduced"
    assert claims.fresh_noise_helps(UP, UP, FLAT).verdict == "not reproduced"
    assert claims.fresh_noise_helps(FLAT, UP, DOWN).verdict == "opposite"
    assert claims.initial_noise_dominates([(9.0, 1.0), (3.0, 0.9)]).verdict == "reproduced"
    assert claims.initial_noise_dominates([(9.0, 1.0), (2.0, 0.9)]).verdict == "not reproduced"
    assert claims.initial_noise_dominates([(0.1, 0.01), (0.2, 0.1)]).verdict == "opposite"
    assert claims.semi_on_policy_does_not_hack((UP, DOWN), (UP, FLAT), UP).verdict == "reproduced"
    assert claims.semi_on_policy_does_not_hack((UP, FLAT), (UP, DOWN), DOWN).verdict == "opposite"
    assert claims.semi_on_policy_does_not_hack((UP, UP), (UP, UP), FLAT).verdict == "not reproduced"
    assert claims.off_policy_collapses((DOWN, DOWN), (UP, FLAT), DOWN).verdict == "reproduced"
    assert claims.off_policy_collapses((UP, DOWN), (UP, FLAT), DOWN).verdict == "not reproduced"
    assert claims.off_policy_collapses((UP, UP), (UP, FLAT), UP).verdict == "opposite"
    scales = [0.0, 0.5, 1.0]
    assert claims.scale_trades(scales, [[1, 2, 3]], [[3, 2, 1]]).verdict == "reproduced"
    assert claims.scale_trades(scales, [[1, 2, 3]], [[1, 3, 2]]).verdict == "not reproduced"
    assert claims.scale_trades(scales, [[3, 2, 1]], [[3, 2, 1]]).verdict == "opposite"


def test_rank_correlation() -> None:
    for _ in range(5):
        first, second = torch.randint(6, (2, 9)).tolist()
        first[0], first[1] = 6, 7  # never all the same
        second[0], second[1] = 6, 7
        places = [[np.flatnonzero(np.sort(values) == value).mean() for value in values] for values in (first, second)]
        assert claims.rank_correlation(first, second) == pytest.approx(np.corrcoef(*places)[0, 1], abs=1e-12)
    assert claims.rank_correlation([1, 2, 3], [5, 5, 5]) == 0


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


def test_page(tmp_path: Path) -> None:
    seeds = (0, 1)
    for method in outcome.METHODS:
        for seed in seeds:
            before, after = evaluation(0.5, toy_ta=-0.7)
            folder = tmp_path / "runs" / f"{method}-{seed}"
            folder.mkdir(parents=True)
            (folder / "evaluation.json").write_text(json.dumps({"before": before, "after": after}))
    for seed in seeds:
        folder = tmp_path / "merges" / str(seed)
        folder.mkdir(parents=True)
        points = [{"scale": s, "scores": {"reward": {"mean": 2 + s}, "held_out": {"mean": 1 - s / 9}}} for s in (0.0, 0.5, 1.0)]
        base = {"reward": {"mean": 1.9}, "held_out": {"mean": 0.95}}
        (folder / "sweep.json").write_text(json.dumps({"scales": points, "baseline": base, "chosen": 0.5 if seed else None}))
        (folder / "sweep.html").write_text("-")
    (tmp_path / "entropy").mkdir()
    ratio = {"ratio": {"mean": 20.0, "error": 2.0}}
    (tmp_path / "entropy" / "entropy.json").write_text(json.dumps({"summary": [{"pivot": p, "frames": ratio} for p in (1, 2)]}))
    judged = outcome.write_outcome(tmp_path, seeds, quick=True)
    text = (tmp_path / "index.html").read_text()
    parser = Balanced()
    parser.feed(text)
    assert not parser.open and set(parser.links) == {"merges/0/sweep.html", "merges/1/sweep.html"}
    assert all(escape(claim.title) in text and claim.verdict in text for claim in judged)
    assert "its outcomes mean nothing" in text and "by seed: none, 0.5" in text
    assert "20.0 ± 2.0, 20.0 ± 2.0 times" in text
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [claim["verdict"] for claim in saved["claims"]] == [claim.verdict for claim in judged]
    assert saved["changes"]["ar_copo"]["toy_ta"]["mean"] == pytest.approx(-0.7, abs=0.2)


def test_jobs_come_after_what_they_need(tmp_path: Path) -> None:
    todo = command.jobs(command.FULL, tmp_path)
    names = [job.name for job in todo]
    assert len(set(names)) == len(names) and len(command.FULL.seeds) >= 3
    for place, job in enumerate(todo):
        assert all(names.index(needed) < place for needed in job.after)
        assert job.command()[:2][0] == "-m" and not job.done()


def test_a_failing_job_names_its_log(tmp_path: Path) -> None:
    jobs = [
        command.Job("good", lambda: ["-c", "open(r'%s', 'w').close()" % (tmp_path / "there")], (tmp_path / "there").exists),
        command.Job("bad", lambda: ["-c", "import sys; print('what went wrong'); sys.exit(3)"], lambda: False, ("good",)),
    ]
    with pytest.raises(command.UserError, match=r"bad ended with status 3: what went wrong \(see .*bad.txt\)"):
        command.run_all(jobs, tmp_path, 2)
    assert jobs[0].done()


def test_a_judge_that_errs() -> None:
    """By a fixed number for each video, of the stated size, drawn for each reward anew."""
    frames, prompts = torch.rand(64, 3, 3, 16, 16), ["a red circle moving left"] * 64
    judges = [load_reward(f"erring:{name}") for name in ("VisualQuality", "MotionQuality", "TextAlignment")]
    errors = torch.stack([judge(frames, prompts) - judge.function.reward(frames, prompts) for judge in judges])
    again = torch.stack([judge(frames.flip(0), prompts).flip(0) - judge.function.reward(frames, prompts) for judge in judges])
    torch.testing.assert_close(errors, again, rtol=0, atol=1e-6)
    assert (errors.std(dim=1) / 0.01 - 1).abs().max() < 0.5 and errors.mean(1).abs().max() < 0.006
    assert (torch.corrcoef(errors) - torch.eye(3)).abs().max() < 0.6
