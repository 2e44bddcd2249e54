"""The report of one run and the model card, built from a run directory of random numbers."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from support.runs import NAMES, PROMPT, STEPS, Page, evaluation, settings, write_run

from arcopo_fast.config.reading import load_config, resolved_yaml
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.changes import changes
from arcopo_fast.reports.charts import Mark, Spread, _ticks, line_chart, scatter_chart
from arcopo_fast.reports.model_card import config_hash, model_card
from arcopo_fast.reports.results import points, stage_seconds
from arcopo_fast.reports.run import write_report
from arcopo_fast.storage.metrics import MetricsWriter
from arcopo_fast.storage.run_dir import RunDirectory


def test_the_report_needs_nothing_else_and_holds_everything(tmp_path: Path) -> None:
    document = evaluation()
    run = write_run(tmp_path, document=document)
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    # the videos are embedded byte for byte
    videos = [base64.b64decode(value.removeprefix("data:video/mp4;base64,")) for value in page.sources]
    assert videos == [(run / video[side]).read_bytes() for video in document["videos"] for side in ("before", "after")]
    # readable on a phone and in the dark
    assert 'name="viewport" content="width=device-width' in page.source and "prefers-color-scheme: dark" in page.source
    for name in NAMES:
        before, after = document["before"][name]["mean"], document["after"][name]["mean"]
        assert f"{name} {before:.3f} {after:.3f} {after - before:+.3f} ±".replace("-", "−") in page.text
    assert PROMPT in page.text  # escaped in the source
    assert "reward 0.125 → 0.875" in page.text
    assert " ".join(resolved_yaml(settings(tmp_path)).split()) in page.text
    titles = (
        "Reward",
        "Each reward",
        "Spread in a group",
        "Live fraction",
        "Ratios outside the clip",
        "Gradient norm",
        "Spread of the ratios",
    )
    assert set(titles) <= set(page.charts())
    assert "update 2" in page.text and f"{STEPS} of {STEPS} iterations" in page.text
    assert "Groups without variance: none." in page.text and "Groups without variance" not in page.charts()
    assert "not come to its end" not in page.text
    # where the time went: 3 s and 1 s of 4 s
    assert "rollout 3.000 75 % update 1.000 25 % an iteration 4.000" in page.text
    for chart in page.charts().values():
        ElementTree.fromstring(chart)


def test_a_run_that_was_cut_short_still_gets_a_report(tmp_path: Path) -> None:
    run = RunDirectory.create(settings(tmp_path))
    page = Page(write_report(run.path))
    assert "mine" in page.text and f"0 of {STEPS} iterations" in page.text and "Before and after" not in page.text
    assert "Not here yet: iterations, before and after, videos." in page.text
    with MetricsWriter(run.path, tensorboard=False) as writer:
        writer.write(1, {"reward": 1.0, "time": {"rollout": 1.0}})
    page = Page(write_report(run.path, tmp_path / "elsewhere.html"))
    assert "Not here yet: before and after, videos." in page.text and "held-out" not in page.text


def test_the_time_of_many_ranks_together(tmp_path: Path) -> None:
    run = RunDirectory.create(settings(tmp_path))
    with MetricsWriter(run.path, tensorboard=False) as writer:
        for step in (1, 2):
            writer.write(step, {"reward": 1.0, "time": {"replay": 6.0, "wait": 3.0 - step, "reduce": 0.5}})
    assert "replay 6.000 75 % wait for other ranks 1.500 19 % reduce: sum over ranks 0.500 6 %" in Page(write_report(run.path)).text


def test_what_is_not_known_is_a_dash(tmp_path: Path) -> None:
    document = evaluation()
    videos = len(document["before"]["toy_vq"]["values"])
    document["after"]["toy_vq"] |= {"mean": None, "std": None, "values": [None] * videos}
    document["after"]["shape_fidelity"]["values"][1:] = [None] * (videos - 1)
    run = write_run(tmp_path, document=document)
    found = {one.name: one for one in changes(settings(tmp_path), json.loads((run / "evaluation.json").read_text()))}
    assert not found["toy_vq"].known and not found["shape_fidelity"].known and found["reward"].known
    page = Page(write_report(run))
    assert f"toy_vq ({videos} left out: no score) – – – –" in page.text
    assert "Not judged, for want of two videos or of finite values: shape_fidelity." in page.text
    assert "No held-out metric fell" not in page.text


def test_pairs_with_a_failed_score_are_left_out(tmp_path: Path) -> None:
    config, document = settings(tmp_path), evaluation()
    before, after = (np.array(document[side]["toy_vq"]["values"]) for side in ("before", "after"))
    document["before"]["toy_vq"]["values"][0] = None
    document["after"]["toy_vq"]["values"][2] = None
    (one,) = [one for one in changes(config, document) if one.name == "toy_vq"]
    kept = [index for index in range(len(before)) if index not in (0, 2)]
    assert one.failed == 2 and one.before == pytest.approx(before[kept].mean()) and one.after == pytest.approx(after[kept].mean())
    assert one.error == pytest.approx((after - before)[kept].std(ddof=1) / len(kept) ** 0.5)
    assert one.spread == pytest.approx(before[kept].std()) and one.better == pytest.approx((after > before)[kept].mean())


def test_changes_are_paired(tmp_path: Path) -> None:
    config, document = settings(tmp_path), evaluation()
    found = changes(config, document)
    assert [(one.name, one.kind) for one in found] == [
        ("reward", "total"),
        ("toy_mq", "trained"),
        ("toy_vq", "trained"),
        ("shape_fidelity", "held out"),
    ]
    for one in found:
        before, after = (np.array(document[side][one.name]["values"]) for side in ("before", "after"))
        assert one.change == pytest.approx((after - before).mean(), abs=1e-12)
        assert one.in_spreads == pytest.approx((after - before).mean() / before.std())
        assert one.error == pytest.approx((after - before).std(ddof=1) / len(before) ** 0.5)
        assert one.better == pytest.approx((after > before).mean())


FELL, HARMED, NONE = "The reward is being exploited", "Held-out metrics fell, and the reward did not rise", "No held-out metric fell"


@pytest.mark.parametrize(
    ("reward", "held_out", "trained", "said"),
    [
        (2.1, -2.1, 5.0, FELL),
        (2.1, -1.9, 5.0, NONE),  # the fall is within two standard errors
        (1.9, -2.1, 5.0, HARMED),  # and here the rise
        (-2.1, -2.1, 5.0, HARMED),
        (2.1, 2.1, -9.0, NONE),  # a reward that is trained on and falls is not held out
    ],
)
def test_the_warning_comes_when_held_out_and_trained_part(
    tmp_path: Path, reward: float, held_out: float, trained: float, said: str
) -> None:
    document = evaluation({"reward": reward, "shape_fidelity": held_out, "toy_mq": trained})
    page = Page(write_report(write_run(tmp_path, document=document)))
    assert [text for text in (FELL, HARMED, NONE) if text in page.text] == [said]
    if said != NONE:
        assert 'class="warning"' in page.source
        before, after = (np.array(document[side]["shape_fidelity"]["values"]) for side in ("before", "after"))
        assert f"shape_fidelity fell by {(before - after).mean() / before.std():.2f} standard deviations of a video" in page.text
    assert ("arcopo_fast.merge" in page.text) is (said == FELL)


def test_without_held_out_metrics_nothing_is_claimed(tmp_path: Path) -> None:
    document = evaluation()
    for side in ("before", "after"):
        del document[side]["shape_fidelity"]
    page = Page(write_report(write_run(tmp_path, document=document)))
    assert "No held-out metric was measured" in page.text and NONE not in page.text


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"before": [1]}', '{"before": {"reward": 3}}', "\x00"])
def test_a_broken_evaluation_is_named(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path)
    (run / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json: not the evaluation of a run"):
        write_report(run)


def test_metrics_are_read_in_order_and_once() -> None:
    records = [{"step": 2, "x": 1.0}, {"step": 1, "x": 3}, {"step": 2, "x": 5.0}, {"step": 4, "x": None}, {"x": 7.0}, {"step": 5, "x": "y"}]
    assert points(records, "x") == [(1, 3.0), (2, 5.0)]
    # a stage that some iterations do not have counts by what it took, so the stages add up
    assert stage_seconds([{"time": {"a": 1.0, "b": 3.0}}, {"time": {"a": 2.0}}, {"step": 3}]) == {"a": 1.5, "b": 1.5}
    former, present = ({"time": {name: 1.0}} for name in ("optimiser", "optimizer"))
    assert stage_seconds([former, present]) == {"optimizer": 1.0}


def test_charts_place_points_in_proportion() -> None:
    points = [(float(x), random.gauss(0, 1)) for x in range(1, 20)]
    chart = ElementTree.fromstring(line_chart({"": points}, title="x", width=400, height=200))
    (line,) = chart.iter("polyline")
    drawn = np.array([pair.split(",") for pair in line.attrib["points"].split()], dtype=float)
    wanted = np.array(points)
    for axis, direction in ((0, 1), (1, -1)):
        slope, _ = np.polyfit(wanted[:, axis], drawn[:, axis], 1)
        assert slope * direction > 0
        assert np.corrcoef(wanted[:, axis], drawn[:, axis])[0, 1] * direction > 0.9999
    assert drawn[:, 0].min() >= 0 and drawn[:, 0].max() <= 400 and drawn[:, 1].min() >= 0 and drawn[:, 1].max() <= 200
    labels = {name: [(1.0, 2.0), (2.0, 2.0)] for name in ("a", "<b>")}
    assert [text.text for text in ElementTree.fromstring(line_chart(labels, title="flat")).iter("text")][-2:] == ["a", "<b>"]


def test_a_spread_lies_behind_its_line() -> None:
    lines = [[(float(x), random.random()) for x in range(6)] for _ in range(3)]
    ys = np.array([[y for _, y in line] for line in lines])
    band = [(float(x), ys[:, x].min(), ys[:, x].max()) for x in range(6)]
    mean = [(float(x), ys[:, x].mean()) for x in range(6)]
    source = line_chart({"none": [], "b": mean}, title="x", spreads={"b": Spread(band, lines)}, legend=False)
    chart = ElementTree.fromstring(source)

    def drawn(element: ElementTree.Element) -> np.ndarray:
        return np.array([pair.split(",") for pair in element.attrib["points"].split()], dtype=float)

    (polygon,) = chart.iter("polygon")
    *thin, line = chart.iter("polyline")
    assert [element.attrib["class"] for element in thin] == ["thin s1"] * 3 and line.attrib["class"] == "line s1"
    heights = np.stack([drawn(element)[:, 1] for element in thin])
    outline = drawn(polygon)
    np.testing.assert_allclose(outline[:6, 1], heights.max(0), atol=0.06)  # the low side; upwards is less in SVG
    np.testing.assert_allclose(outline[:5:-1, 1], heights.min(0), atol=0.06)
    np.testing.assert_allclose(drawn(line)[:, 1], heights.mean(0), atol=0.11)
    assert list(chart.iter("text"))[-1].text != "b"  # no legend


def test_scatter_charts_shade_where_x_rises_and_y_falls() -> None:
    marks = [Mark(random.gauss(0, 1), random.gauss(0, 1), 0.2, 0.1, index, f"<{index}>") for index in range(9)]
    chart = ElementTree.fromstring(scatter_chart(marks, title="t", x_label="a & b"))
    circles = [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in chart.iter("circle")]
    (shade,) = chart.iter("rect")
    left, top, width, height = (float(shade.attrib[name]) for name in ("x", "y", "width", "height"))
    for mark, (x, y) in zip(marks, circles):
        inside = left <= x <= left + width and top <= y <= top + height
        assert inside is (mark.x > 0 > mark.y)
    assert [one.find("title").text for one in chart.iter("circle")] == [mark.label for mark in marks]  # type: ignore[union-attr]
    errors = [one for one in chart.iter("polyline") if "error" in one.attrib["class"]]
    assert len(errors) == 2 * len(marks)


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 250.0, 1e6])
def test_ticks_span_the_values_with_few_round_numbers(scale: float) -> None:
    for _ in range(50):
        low, high = sorted(random.gauss(0, scale) for _ in range(2))
        ticks = _ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 6
        assert len({round(b - a, 12) for a, b in zip(ticks, ticks[1:])}) == 1 or scale < 1e-3
    assert len(_ticks(3.0, 3.0)) >= 3 and len(_ticks(0.0, 0.0)) >= 3


def test_the_model_card_says_what_was_done(tmp_path: Path) -> None:
    config, document = settings(tmp_path), evaluation()
    card = model_card(config, document)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "peft"
    for part in (
        "toy_vq x 1, toy_mq x 0.5",
        f"rank {config.lora.rank}",
        f"| seed | {config.seed} |",
        "aligned with\nAR-CoPO (arXiv 2603.17461)",
        "| groups | on-policy |",
        config_hash(config),
        "load_lora_adapter",
    ):
        assert part in card
    after = document["after"]["toy_vq"]["mean"]
    assert re.search(rf"\| toy_vq \| trained \| .* \| {after:.3f} \|", card)
    assert "Not evaluated" in model_card(config, {})
    assert "SDE-GRPO" in model_card(settings(tmp_path, "objective={kind: sde_grpo}"), {})
    assert config_hash(config) != config_hash(load_config("toy"))
