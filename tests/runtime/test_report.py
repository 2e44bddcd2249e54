"""The report and the model card, built from a run directory of random numbers."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

from arcopo_fast.config import Config, load_config, resolved_yaml
from arcopo_fast.errors import UserError
from arcopo_fast.runtime.charts import _ticks, line_chart
from arcopo_fast.runtime.metrics import MetricsWriter
from arcopo_fast.runtime.report import compare, config_hash, model_card, write_report
from arcopo_fast.runtime.run_dir import RunDirectory
from arcopo_fast.runtime.video import write_mp4

STEPS = 12
VIDEOS = 16
PROMPT = 'a <b>red</b> circle & "a square"'


def settings(folder: Path) -> Config:
    return load_config("toy", [f"run.directory={folder}", "name=mine", "rewards={toy_vq: 1, toy_mq: 0.5}", f"train.iterations={STEPS}"])


def measured(shift: float) -> dict[str, Any]:
    values = [random.gauss(shift, 0.2) for _ in range(VIDEOS)]
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "values": values}


def evaluation() -> dict[str, Any]:
    names = {"shape_fidelity": -0.5, "toy_mq": 1.0, "reward": 2.0, "toy_vq": 1.0}
    return {
        "before": {name: measured(0.0) for name in names},
        "after": {name: measured(shift) for name, shift in names.items()},
        "videos": [],
    }


def fake_run(folder: Path) -> tuple[RunDirectory, Config, dict[str, Any]]:
    config = settings(folder)
    run = RunDirectory.create(config)
    with MetricsWriter(run.path, tensorboard=False) as writer:
        for step in range(1, STEPS + 1):
            record: dict[str, Any] = {
                name: random.random() for name in ("reward", "reward_std", "reward/toy_vq", "reward/toy_mq", "gradient_norm")
            }
            record |= {
                "update1/live": 1.0,
                "update2/live": random.random(),
                "update1/outside_clip": 0.0,
                "update2/outside_clip": random.random(),
            }
            record |= {"update1/ratio_max": 0.0, "update2/ratio_max": math.nan if step == 3 else random.random() * 1e-3}
            writer.write(step, record | {"time": {"rollout": 3.0, "update": 1.0}})
    document = evaluation()
    for index in range(2):
        video = {"prompt": PROMPT, "seed": index, "reward_before": 0.125, "reward_after": 0.875}
        for side in ("before", "after"):
            video[side] = f"samples/{side}-{index:02d}.mp4"
            write_mp4(run.path / str(video[side]), torch.rand(3, 3, 32, 32), 8)
        document["videos"].append(video)
    run.write("evaluation.json", json.dumps(document))
    return run, config, document


class Page(HTMLParser):
    """Checks that tags close in order, and collects the text, the attributes that could load something, and the tables."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "poster", "srcset", "data")]
        assert tag not in ("script", "iframe", "link")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass  # inside SVG

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.words))


def test_the_report_needs_nothing_else_and_holds_everything(tmp_path: Path) -> None:
    run, config, document = fake_run(tmp_path)
    path = write_report(run.path)
    assert path == run.path / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    # one file: every source is embedded, the videos byte for byte
    assert not re.search(r"https?://|url\(|@import", source)
    videos = [base64.b64decode(value.removeprefix("data:video/mp4;base64,")) for value in page.sources]
    assert videos == [(run.path / video[side]).read_bytes() for video in document["videos"] for side in ("before", "after")]
    # readable on a phone and in the dark
    assert 'name="viewport" content="width=device-width' in source and "prefers-color-scheme: dark" in source
    for name in ("reward", "toy_vq", "toy_mq", "shape_fidelity"):
        before, after = document["before"][name]["mean"], document["after"][name]["mean"]
        assert f"{name} {before:.3f} {after:.3f} {after - before:+.3f} ±".replace("-", "−") in page.text
    assert PROMPT in page.text  # escaped in the source
    assert "reward 0.125 → 0.875" in page.text
    assert resolved_yaml(config).strip() in page.text
    for title in ("Reward", "Each reward", "Spread in a group", "Live fraction", "Ratios outside the clip", "Gradient norm"):
        assert f"<b>{title}</b>" in source
    assert "update 2" in page.text and f"{STEPS} of {STEPS} iterations" in page.text
    assert "Groups without variance" not in page.text  # there were none
    # where the time went: 3 s and 1 s of 4 s
    assert "rollout 3.000 75 % update 1.000 25 % an iteration 4.000" in page.text
    for chart in re.findall(r"<svg.*?</svg>", source):
        ElementTree.fromstring(chart)
    assert not re.search(r"\b(nan|inf|None)\b", page.text)


def test_a_run_that_was_cut_short_still_gets_a_report(tmp_path: Path) -> None:
    run = RunDirectory.create(settings(tmp_path))
    page = Page(write_report(run.path).read_text())
    assert "mine" in page.text and f"0 of {STEPS} iterations" in page.text and "Before and after" not in page.text
    with MetricsWriter(run.path, tensorboard=False) as writer:
        writer.write(1, {"reward": 1.0, "time": {"rollout": 1.0}})
    Page(write_report(run.path).read_text())
    with pytest.raises(UserError):
        write_report(tmp_path / "absent")


def test_changes_are_paired(tmp_path: Path) -> None:
    config, document = settings(tmp_path), evaluation()
    found = compare(config, document)
    assert [(one.name, one.kind) for one in found] == [
        ("reward", "total"),
        ("toy_mq", "trained"),
        ("toy_vq", "trained"),
        ("shape_fidelity", "held out"),
    ]
    for one in found:
        before, after = (np.array(document[side][one.name]["values"]) for side in ("before", "after"))
        assert one.change == pytest.approx((after - before).mean(), abs=1e-12)
        assert one.error == pytest.approx((after - before).std(ddof=1) / len(before) ** 0.5)
        assert one.better == pytest.approx((after > before).mean())


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
        config_hash(config),
        "load_lora_adapter",
    ):
        assert part in card
    after = document["after"]["toy_vq"]["mean"]
    assert re.search(rf"\| toy_vq \| trained \| .* \| {after:.3f} \|", card)
    assert "Not evaluated" in model_card(config, {})
    assert config_hash(config) != config_hash(load_config("toy"))
