"""Small evaluations of the toy: adapters to compare, and readers of what an evaluation left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from arcopo_fast.build import load_generator
from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation.scores import ScoreDirectory, Scores, Video
from arcopo_fast.model.lora import BLOCK_TARGETS, adapter_parameters, add_lora, save_adapter
from support.commands import SHORT

SMALL = ["toy", *SHORT, "train.threads=1"]
THREE = ["evaluation.prompts=3", "--videos", "2"]
CAPTIONS = ["a red circle moving left", "a blue square moving up", "a green cross moving right"]


def scores_in(directory: Path) -> Scores:
    return ScoreDirectory.open(directory).read()


def results_in(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "results.json").read_text())["results"]


def lines_in(directory: Path) -> list[Video]:
    """The video of every line, duplicates included."""
    records = [json.loads(line) for file in directory.glob("scores/*.jsonl") for line in file.read_text().splitlines()]
    return [Video(record["generator"], record["prompt"], record["number"]) for record in records]


def whole(adapters: dict[str, Path]) -> list[str]:
    options = [f"{adapters['on']}@1,-0.5", f"mine={adapters['semi']}", str(adapters["zero"] / "adapter")]
    return [*SMALL, *THREE, *(word for option in options for word in ("--adapter", option)), "--batch", "4", "--keep-videos", "1"]


def lines_in_bytes(out: Path) -> list[Video]:
    """The videos of all whole lines."""
    lines = [line for file in out.glob("scores/*.jsonl") for line in file.read_bytes().split(b"\n")[:-1]]
    return [Video(record["generator"], record["prompt"], record["number"]) for record in map(json.loads, lines)]


def write_adapters(folder: Path) -> dict[str, Path]:
    """Write adapters of different rank, alpha and layers; `zero` adds nothing, and `thin` is of another generator."""
    generator = load_config("toy", SMALL[1:])
    for name, rank, alpha, targets in (("on", 3, 7.0, BLOCK_TARGETS), ("semi", 5, 10.0, ("to_q", "proj_out")), ("zero", 2, 2.0, ("to_k",))):
        model = add_lora(load_generator(generator).model, rank=rank, alpha=alpha, targets=targets, seed=0)
        for parameter in adapter_parameters(model) if name != "zero" else ():
            nn.init.normal_(parameter, std=0.08)
        save_adapter(folder / name / "adapter", model, base_model="toy")
    thin = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(9, 9)})})])})
    save_adapter(folder / "thin", add_lora(thin, rank=2, alpha=2, targets=["to_q"], seed=0))
    return {name: folder / name for name in ("on", "semi", "zero", "thin")}
