"""Run directories of random numbers, as `train` leaves them, and a strict reader of the pages made from them."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.storage.metrics import MetricsWriter
from arcopo_fast.storage.run_dir import RunDirectory
from arcopo_fast.storage.video import write_mp4

STEPS = 12
VIDEOS = 16
PROMPT = 'a <b>red</b> circle & "a square"'
NAMES = ("shape_fidelity", "toy_mq", "reward", "toy_vq")  # shape_fidelity is held out


def settings(folder: Path, *overrides: str) -> Config:
    common = [f"run.directory={folder}", "name=mine", "rewards={toy_vq: 1, toy_mq: 0.5}", f"train.iterations={STEPS}"]
    common += ["optimizer.lr=5e-4", "objective.tau=1.0", "objective.clip=0.02", "optimizer.gradient_clip=0.02"]
    common += ["rollout.prompts_per_iteration=1"]
    return load_config("toy", [*common, *overrides])


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "values": list(values)}


def differing(errors: float, count: int = VIDEOS) -> np.ndarray:
    """Differences whose mean is so many of their standard errors; `count` is even."""
    size = random.uniform(0.1, 0.2)  # the sample's standard deviation is size sqrt(n / (n - 1)), its error that over sqrt(n)
    return np.tile([size, -size], count // 2) + errors * size / math.sqrt(count - 1)


def evaluation(errors: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Random values before; after, they have changed by so many standard errors, by name."""
    document: dict[str, Any] = {"before": {}, "after": {}, "videos": []}
    for name in NAMES:
        before = np.array([random.gauss(1, 0.3) for _ in range(VIDEOS)])
        document["before"][name] = summary(before)
        document["after"][name] = summary(before + differing((errors or {}).get(name, random.uniform(5, 9))))
    return document


def write_run(
    folder: Path, *overrides: str, document: dict[str, Any] | None = None, steps: int = STEPS, prompts: Sequence[str] = (PROMPT,) * 2
) -> Path:
    """A run directory; without a `document`, one of a run that was not evaluated."""
    config = settings(folder, *overrides)
    with RunDirectory.create(config).owned() as run, MetricsWriter(run.path, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            names = ["reward", "reward_std", "gradient_norm", *(f"reward/{name}" for name in config.rewards)]
            record: dict[str, Any] = {name: random.random() for name in names}
            record |= {"zero_variance_groups": 0.0, "update1/live": 1.0, "update1/outside_clip": 0.0, "update1/ratio_max": 0.0}
            record |= {"update2/live": random.random(), "update2/outside_clip": random.random(), "update2/ratio_std": random.random()}
            record["update2/ratio_max"] = math.nan if step == 3 else random.random() * 1e-3
            writer.write(step, record | {"time": {"rollout": 3.0, "update": 1.0}})
    if document is not None:
        for index, prompt in enumerate(prompts):
            video = {"prompt": prompt, "seed": index, "reward_before": 0.125, "reward_after": 0.875}
            for side in ("before", "after"):
                video[side] = f"samples/{side}-{index:02d}.mp4"
                write_mp4(run.path / str(video[side]), torch.rand(3, 3, 32, 32), 8)
            document["videos"].append(video)
        run.write("evaluation.json", json.dumps(document))
    return run.path


class Page(HTMLParser):
    """Checks that tags close in order and that nothing is loaded from elsewhere; collects the text and the sources."""

    VOID = {"meta", "br"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert not self.open
        assert all(source.startswith("data:video/mp4;base64,") for source in self.sources)
        assert not re.search(r"https?://|url\(|@import", self.source)
        assert not re.search(r"\b(nan|inf|None)\b", self.text)

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
        if "style" not in self.open:
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def charts(self) -> dict[str, str]:
        """SVG by title."""
        return {re.findall('aria-label="([^"]*)"', chart)[0]: chart for chart in re.findall(r"<svg.*?</svg>", self.source)}
