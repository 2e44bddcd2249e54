"""The page of several runs: what makes a series, how it is called, means and spreads over seeds, and which videos stand side by side."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support.runs import NAMES, PROMPT, Page, evaluation, settings, write_run

from arcopo_fast.reports import comparison
from arcopo_fast.reports.comparison import write_comparison
from arcopo_fast.reports.results import Run, read_run
from arcopo_fast.reports.series import group, over_seeds
from arcopo_fast.reports.table import plain, signed


def labels(folder: Path, *variants: str) -> list[str]:
    return [one.label for one in group([Run(folder, settings(folder, *filter(None, variant.split("; "))), [], {}) for variant in variants])]


def test_only_what_is_trained_makes_a_series(tmp_path: Path) -> None:
    runs = [
        Run(tmp_path, settings(tmp_path, *changed), [], {})
        for changed in (["seed=2"], ["optimizer.lr=1e-3"], ["seed=0", "name=other", "run.overwrite=true"], ["seed=1", "run.directory=away"])
    ]
    series = group(runs)
    assert [[run.config.seed for run in one.runs] for one in series] == [[0, 1, 2], [0]]
    assert [one.label for one in series] == ["optimizer.lr=0.0005", "optimizer.lr=0.001"]
    assert group(runs[:1])[0].label == "mine"


def test_labels_are_what_differs(tmp_path: Path) -> None:
    assert labels(tmp_path, "evaluation.seed=1", "evaluation.seed=2; objective.clip=null") == [
        "objective.clip=0.02, evaluation.seed=1",
        "objective.clip=null, evaluation.seed=2",
    ]
    # one weight is not another; lists and mappings read as an override would write them
    assert labels(tmp_path, "rewards={toy_vq: 2}", "rewards={toy_vq: 2, toy_ta: 0.5}") == [
        "rewards={toy_vq: 2.0}",
        "rewards={toy_ta: 0.5, toy_vq: 2.0}",
    ]
    # another objective has settings of its own; its name says the most
    baseline = "objective={kind: sde_grpo, clip: 0.02}"
    assert [label.split(",")[0] for label in labels(tmp_path, "", baseline)] == ["objective.kind=copo", "objective.kind=sde_grpo"]
    # more than a label can carry: the first that tell them apart
    many = "optimizer.lr=1e-3; lora.rank=4; train.save_every=0; evaluation.seed=9"
    assert labels(tmp_path, "", many, f"{many}; objective.tau=2") == [
        "objective.tau=1.0, lora.rank=16",
        "objective.tau=1.0, lora.rank=4",
        "objective.tau=2.0, lora.rank=4",
    ]


def test_means_and_bands_over_seeds() -> None:
    lengths = (9, 7, 12)
    curves = [[(float(x), random.gauss(0, 1)) for x in range(1, length + 1) if x != 4 or length != 7] for length in lengths]
    mean, spread = over_seeds(curves)
    table = np.full((3, 13), np.nan)
    for row, points in enumerate(curves):
        for x, y in points:
            table[row, int(x)] = y
    everywhere = [1, 2, 3, 5, 6, 7]  # iteration 4 is missing in one, and the shortest ends at 7
    assert [x for x, _ in mean] == [x for x, _, _ in spread.band] == everywhere
    np.testing.assert_allclose([y for _, y in mean], table.mean(0)[everywhere])
    np.testing.assert_allclose([low for _, low, _ in spread.band], table.min(0)[everywhere])
    np.testing.assert_allclose([high for _, _, high in spread.band], table.max(0)[everywhere])
    assert spread.lines == curves
    assert over_seeds([])[0] == over_seeds([[]])[0] == []
    assert over_seeds([[(1.0, 2.0)], [(2.0, 3.0)]])[0] == []


@pytest.fixture
def runs(tmp_path: Path) -> dict[tuple[str, int], tuple[Path, dict[str, Any]]]:
    """Three seeds of one setting and two of another, by learning rate and seed. Shape fidelity falls in one run of the first."""
    made = {}
    for lr, seed in (("0.0005", 0), ("0.0005", 1), ("0.0005", 2), ("0.001", 0), ("0.001", 1)):
        document = evaluation({"shape_fidelity": -4.0 if (lr, seed) == ("0.0005", 1) else 1.0, "reward": 6.0})
        path = write_run(tmp_path, f"optimizer.lr={lr}", f"seed={seed}", document=document)
        made[lr, seed] = (path, document)
    return made


def test_the_page_holds_every_run_and_the_means(tmp_path: Path, runs: dict[tuple[str, int], tuple[Path, dict[str, Any]]]) -> None:
    page = Page(write_comparison([path for path, _ in runs.values()], tmp_path / "page.html"))
    assert "2 series · 5 runs" in page.text
    for number, (lr, seeds) in enumerate({"0.0005": 3, "0.001": 2}.items(), start=1):
        for name in NAMES:
            changed = []
            for seed in range(seeds):
                before, after = (np.array(runs[lr, seed][1][side][name]["values"]) for side in ("before", "after"))
                difference = after - before
                error = difference.std(ddof=1) / len(before) ** 0.5
                assert (
                    f"{number} seed {seed} {plain(before.mean())} {plain(after.mean())} {signed(difference.mean())} ± {error:.3f} "
                    f"{signed(difference.mean() / before.std(), 2)}"
                ) in page.text
                changed.append((before.mean(), after.mean(), difference.mean(), difference.mean() / before.std()))
            mean, spread = np.mean(changed, axis=0), np.std(changed, axis=0, ddof=1)
            assert (
                f"{number} mean {plain(mean[0])} ± {spread[0]:.3f} {plain(mean[1])} ± {spread[1]:.3f} "
                f"{signed(mean[2])} ± {spread[2]:.3f} {signed(mean[3], 2)} ± {spread[3]:.2f}"
            ) in page.text
            if name == "reward":  # the first column of the table above
                assert f"{number} optimizer.lr={lr} {seeds} {signed(mean[3], 2)} ± {spread[3]:.2f}" in page.text
    # curves of each seed, thin, behind one line for each series
    charts = page.charts()
    for title in ("Reward", "toy_vq", "toy_mq", "Spread in a group", "Live fraction", "Ratios outside the clip", "Largest |ratio − 1|"):
        styles = [one.attrib["class"] for one in ElementTree.fromstring(charts[title]).iter("polyline")]
        assert sorted(styles) == sorted(["line s0", "line s1"] + ["thin s0"] * 3 + ["thin s1"] * 2), title
    assert len(list(ElementTree.fromstring(charts["shape_fidelity"]).iter("circle"))) == 5
    # settings: what differs, and once what does not
    assert "optimizer.lr 0.0005 0.001" in page.text
    assert page.text.count("optimizer.gradient_clip=0.02") == 1 and "optimizer.lr=0.0005 optimizer" not in page.text
    assert "1 optimizer.lr=0.0005 4.000 3.000 1.000" in page.text  # seconds: an iteration, rollout, update


def test_the_warning_names_the_runs(tmp_path: Path, runs: dict[tuple[str, int], tuple[Path, dict[str, Any]]]) -> None:
    page = Page(write_comparison([path for path, _ in runs.values()], tmp_path / "page.html"))
    before, after = (np.array(runs["0.0005", 1][1][side]["shape_fidelity"]["values"]) for side in ("before", "after"))
    fall = (before - after).mean() / before.std()
    assert f"shape_fidelity fell by {fall:.2f} standard deviations of a video in 1 of 3 runs of optimizer.lr=0.0005 (seed 1)" in page.text
    assert page.source.count('class="warning"') == 1 and "No held-out metric fell" not in page.text
    others = [path for key, (path, _) in runs.items() if key != ("0.0005", 1)]
    page = Page(write_comparison(others, tmp_path / "page.html"))
    assert 'class="warning"' not in page.source and "No held-out metric fell by more than two standard errors." in page.text


def sources(page: Page) -> list[bytes]:
    return [base64.b64decode(source.removeprefix("data:video/mp4;base64,")) for source in page.sources]


def files(path: Path, side: str, index: int) -> bytes:
    return (path / f"samples/{side}-{index:02d}.mp4").read_bytes()


def test_videos_of_the_same_noise_stand_side_by_side(tmp_path: Path) -> None:
    first = write_run(tmp_path, document=evaluation())
    same = write_run(tmp_path, "optimizer.lr=1e-3", document=evaluation(), prompts=[PROMPT, "another"])
    noise = write_run(tmp_path, "evaluation.seed=77", document=evaluation())
    page = Page(write_comparison([first, same, noise], tmp_path / "page.html"))
    beside = [files(first, "before", 0), files(first, "after", 0), files(same, "after", 0)]
    alone = [files(first, "before", 1), files(first, "after", 1), files(same, "before", 1), files(same, "after", 1)]  # of two prompts
    other = [files(noise, side, index) for index in range(2) for side in ("before", "after")]
    assert sources(page) == beside + alone + other
    assert PROMPT in page.text and "do not start from the same videos" in page.text


def test_a_page_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"video {number}" for number in range(6)]
    made = [write_run(tmp_path, f"optimizer.lr={lr}", document=evaluation(), prompts=prompts) for lr in (1e-3, 2e-3)]
    page = Page(write_comparison(made, tmp_path / "page.html"))
    assert len(page.sources) == 4 * 3 and "video 3" in page.text and "video 4" not in page.text
    assert "Left out here: 2 more videos" in page.text
    monkeypatch.setattr(comparison, "_MOST_VIDEO_BYTES", 1)  # one row is always shown
    page = Page(write_comparison(made, tmp_path / "page.html"))
    assert len(page.sources) == 3 and "Left out here: 5 more videos" in page.text


def test_rewards_that_weigh_differently_are_not_set_beside_each_other(tmp_path: Path) -> None:
    made = [write_run(tmp_path, f"rewards={{toy_vq: {weight}}}", document=evaluation()) for weight in (1, 2)]
    page = Page(write_comparison(made, tmp_path / "page.html"))
    assert "their total rewards cannot be compared" in page.text and "after, 0.875" not in page.text
    page = Page(write_comparison(made[:1], tmp_path / "page.html"))
    assert "cannot be compared" not in page.text and "after, 0.875" in page.text


def test_runs_that_were_stopped_are_said_and_do_no_harm(tmp_path: Path) -> None:
    whole = write_run(tmp_path, document=evaluation())
    stopped = write_run(tmp_path, "seed=1", steps=5)
    (stopped / "metrics.jsonl").open("ab").write(b'{"step": 6, "rewa')  # torn
    begun = write_run(tmp_path, "seed=2", steps=0)
    once = write_run(tmp_path, "optimizer.lr=1e-3", steps=1)
    no_clip = write_run(tmp_path, "objective.clip=null")
    page = Page(write_comparison([whole, stopped, begun, once, no_clip], tmp_path / "page.html"))
    for path, done in ((stopped, 5), (begun, 0), (once, 1), (no_clip, 12)):
        assert f"{path} ({done} of 12 iterations)" in page.text
    assert f"{whole} (" not in page.text
    clipped = ElementTree.fromstring(page.charts()["Ratios outside the clip"])
    assert not [one for one in clipped.iter("polyline") if "s2" in one.attrib["class"]], "without a clip nothing lies outside it"
    assert [one for one in ElementTree.fromstring(page.charts()["Reward"]).iter("polyline") if "s2" in one.attrib["class"]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_metrics_of_other_objectives_may_lack_fields(tmp_path: Path, order: tuple[int, ...]) -> None:
    made = [write_run(tmp_path, document=evaluation()), write_run(tmp_path, "optimizer.lr=1e-3")]
    lines = [{"step": step, "reward": random.random(), "update1/live": random.random(), "time": None} for step in range(1, 5)]
    (made[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_comparison([made[index] for index in order], tmp_path / "page.html"))
    for title, series in (("Live fraction", {0, 1}), ("Gradient norm", {0})):
        drawn = ElementTree.fromstring(page.charts()[title]).iter("polyline")
        assert {order[int(re.findall(r"s(\d)", one.attrib["class"])[0])] for one in drawn} == series
    assert read_run(made[1]).iterations == 4
