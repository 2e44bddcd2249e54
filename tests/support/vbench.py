"""Prompts and results in VBench's forms, and an environment with a stand-in for its scorer.

The stand-in takes the official arguments, looks for videos as VBench does and leaves the files that VBench leaves.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from arcopo_fast import vbench
from arcopo_fast.evaluation.vbench.data import (
    DIMENSIONS,
    FLICKERING,
    QUALITY,
    RESULTS,
    SEMANTIC,
    Prompt,
    VBenchScores,
)
from support.commands import Ended, outcome

RED, BLUE, GREEN = "a red circle moving left", "a blue square moving up", "a green cross moving right"
INFO = [
    Prompt(RED, (FLICKERING,)),
    Prompt(BLUE, ("color", "object_class")),
    Prompt(GREEN, ("subject_consistency", "dynamic_degree")),
    Prompt(BLUE, ("overall_consistency", "color")),
]


def write_info(path: Path, prompts: Sequence[Prompt] = INFO) -> Path:
    """In the form of VBench_full_info.json, other keys included."""
    entries = [{"prompt_en": text, "dimension": list(dimensions), "auxiliary_info": {"color": "red"}} for text, dimensions in prompts]
    path.write_text(json.dumps(entries))
    return path


# The total

COLUMNS = [*QUALITY, *SEMANTIC]


def scores_of(raw: Sequence[float]) -> VBenchScores:
    return VBenchScores(dict(zip(COLUMNS, raw)), dict.fromkeys(COLUMNS))


def write_results(directory: Path, raw: Mapping[str, Any], *, together: bool = False) -> Path:
    """Write results as the scorer leaves them: one file for each dimension, or one for all."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = {name: [value, [{"video_path": "v", "video_results": value}] * 7] for name, value in raw.items()}
    for number, part in enumerate([entries] if together else [{name: entry} for name, entry in entries.items()]):
        (directory / f"results_{number}{RESULTS}").write_text(json.dumps(part))
        (directory / f"results_{number}_full_info.json").write_text("[]")
    return directory


def random_raw() -> dict[str, float]:
    return {name: random.random() for name in DIMENSIONS}


# Scoring them

STAND_IN = {
    "torch/distributed/run.py": """
import runpy, sys
assert sys.argv[1:3] == ["--standalone", "--nproc_per_node"]
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
""",
    "vbench/launch/evaluate.py": """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--dimension", nargs="+", required=True)
for name in ("videos_path", "full_json_dir", "output_path"):
    parser.add_argument("--" + name, required=True)
options = parser.parse_args()
here = pathlib.Path(__file__).parents[2]
(dimension,) = options.dimension
with open(here / "calls", "a") as calls:
    print(dimension, file=calls)
print("\\n".join(f"line {number} of {dimension}" for number in range(30)))
if (here / "fails").exists() and dimension in (here / "fails").read_text():
    sys.exit("RuntimeError: no detectron2 here")
names = os.listdir(options.videos_path)
ending = pathlib.Path(names[0]).suffix
entries = [entry for entry in json.load(open(options.full_json_dir)) if dimension in entry["dimension"]]
found = []
for entry in entries:
    for index in range(5):
        name = f"{entry['prompt_en']}-{index}{ending}"
        if name in names:
            score = float(open(os.path.join(options.videos_path, name)).read().split()[0])
            found.append({"video_path": name, "video_results": score})
made = pathlib.Path(options.output_path)
(made / "results_2024-01-01-00:00:00_full_info.json").write_text(json.dumps(entries))
mean = sum(video["video_results"] for video in found) / len(found)
(made / "results_2024-01-01-00:00:00_eval_results.json").write_text(json.dumps({dimension: [mean, found]}))
""",
    "vbench/cli/vbench.py": """
import glob, json, os, pathlib, re, shutil, sys
def main():
    command, first, videos, second, results = sys.argv[1:]
    assert (command, first, second) == ("static_filter", "--videos_path", "--result_path")
    here = pathlib.Path(__file__).parents[2]
    with open(here / "calls", "a") as calls:
        print("static_filter", file=calls)
    info = json.load(open(here / "vbench" / "VBench_full_info.json"))
    kept = {entry["prompt_en"]: [] for entry in info if "temporal_flickering" in entry["dimension"]}
    for path in sorted(glob.glob(os.path.join(videos, "*.mp4"))):
        prompt = re.sub(r"-\\d+$", "", pathlib.Path(path).stem)
        if prompt in kept and len(kept[prompt]) < 5 and "static" in open(path).read():
            kept[prompt].append(path)
    os.makedirs(os.path.join(results, "filtered_videos"))
    json.dump(kept, open(os.path.join(results, "filtered_static_video.json"), "w"))
    for prompt, paths in kept.items():
        for index, path in enumerate(paths):
            shutil.copy(path, os.path.join(results, "filtered_videos", f"{prompt}-{index}.mp4"))
""",
}


class Environment:
    """A virtual environment, as far as the command can tell, with the stand-in for VBench; its directories have spaces in their names.

    Attributes:
        values: what the scorer will say of each video, by its name.
        static: the videos of temporal flickering that do not move.
    """

    def __init__(self, root: Path) -> None:
        self.site = root / "of the scorer"
        for name, code in {**STAND_IN, "vbench/__init__.py": "", "torch/__init__.py": "", "torch/distributed/__init__.py": ""}.items():
            (self.site / name).parent.mkdir(parents=True, exist_ok=True)
            (self.site / name).write_text(code)
        self.prompts = [Prompt(f"a prompt of {name}", (name,)) for name in DIMENSIONS] + [Prompt("shared", tuple(QUALITY))]
        write_info(self.site / "vbench" / "VBench_full_info.json", self.prompts)
        self.python = self.site / "bin" / "python"  # a link, as in a virtual environment, which is known by the name it was called by
        self.python.parent.mkdir()
        base = self.site / "base"
        base.write_text(
            '#!/bin/sh\n[ -z "$PYTHONPATH" ] && [ "${0##*/}" = python ] || exit 9\n'
            f'PYTHONPATH="{self.site}" exec "{sys.executable}" "$@"\n'
        )
        base.chmod(0o755)
        self.python.symlink_to(base)
        self.videos = root / "the videos" / "videos"
        self.videos.mkdir(parents=True)
        self.results = self.videos.parent / "results"
        self.values: dict[str, float] = {}
        self.static: list[str] = []
        for prompt, dimensions in self.prompts:
            for index in range(25 if FLICKERING in dimensions else 5):
                name = f"{prompt}-{index}.mp4"
                self.values[name] = random.random()
                if FLICKERING in dimensions and random.random() < 0.4:
                    self.static.append(name)
                (self.videos / name).write_text(f"{self.values[name]!r} {'static' if name in self.static else 'moving'}")

    def calls(self) -> list[str]:
        """Return the calls since the last time."""
        path = self.site / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def expected(self, dimension: str) -> float:
        prompts = [prompt.text for prompt in self.prompts if dimension in prompt.dimensions]
        names = [f"{prompt}-{index}.mp4" for prompt in prompts for index in range(5)]
        if dimension == FLICKERING:  # the first five static ones of each, in the order of their names
            names = [name for prompt in prompts for name in sorted(name for name in self.static if name.startswith(prompt))[:5]]
        return statistics.fmean(self.values[name] for name in names)

    def score(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
        return outcome(vbench.main, capsys, "score", "--python", self.python, "--videos", self.videos, *arguments)
