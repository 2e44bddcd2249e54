"""`python -m arcopo_fast.vbench`: its videos and their seeds, the scorer in its own environment, and the official total.

The scorer is a stand-in that takes the official arguments, looks for videos as VBench does and leaves the files that VBench leaves.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from arcopo_fast import vbench
from arcopo_fast.build import checkpoint_path, load_generator, load_model, sized_engine
from arcopo_fast.cli import run_command
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.vbench.data import (
    DIMENSIONS,
    FLICKERING,
    QUALITY,
    RESULTS,
    SEMANTIC,
    Prompt,
    VBenchScores,
    manifest,
    read_extended,
    read_info,
    read_scores,
    total_score,
    video_seed,
    videos_of,
)
from arcopo_fast.evaluation.videos import stream_frames
from arcopo_fast.model.lora import BLOCK_TARGETS, adapter_parameters, add_lora, save_adapter
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise
from arcopo_fast.storage.video import Mp4Writer

FAST = ["sampler.steps=[1000]", "video.chunks=1", "generator.device=cpu"]
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


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    """Exit status, the lines on stderr, and stdout."""
    status = run_command(vbench.main, list(map(str, arguments)))
    out, err = capsys.readouterr()
    return status, [line for line in err.splitlines() if line.strip()], out


# The total

COLUMNS = [*QUALITY, *SEMANTIC]

# From VBench's leaderboard, in per cent: total, quality, semantic, then the raw scores in the order of `COLUMNS`.
LEADERBOARD = {
    "CogVideoX-5B": "81.61 82.75 77.04 96.23 96.52 98.66 96.92 70.97 61.98 62.90 85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59",
    "CogVideoX-1.5": "82.17 82.78 79.76 96.87 97.35 98.88 98.31 50.93 62.79 65.02 87.47 69.65 97.20 87.55 80.25 52.91 24.89 25.19 27.30",
    "Gen-3": "82.32 84.11 75.17 97.10 96.62 98.61 99.23 60.14 63.34 66.82 87.81 53.64 96.40 80.90 65.09 54.57 24.31 24.71 26.69",
    "Kling": "81.85 83.39 75.68 98.33 97.60 99.30 99.40 46.94 61.21 65.62 87.24 68.05 93.40 89.90 73.03 50.86 19.62 24.17 26.42",
    "Mira": "71.87 78.78 44.21 96.23 96.92 98.29 97.54 60.33 42.51 60.16 52.06 12.52 63.80 42.24 27.83 16.34 21.89 18.77 18.72",
    "CausVid": "84.27 85.65 78.75 97.53 97.19 96.24 98.05 92.69 64.15 68.88 92.99 72.15 99.80 80.17 64.65 56.58 24.27 25.33 27.51",
}

# By hand, from the paper's normalisation: the scores that count as 0 and as 1, in the order of `COLUMNS`.
LOW = [0.1462, 0.2615, 0.6293, 0.706, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0009, 0, 0]
HIGH = [1, 1, 1, 0.9975, 1, 1, 1, 1, 1, 1, 1, 1, 0.8222, 0.2855, 0.364, 0.364]


def scores_of(raw: Sequence[float]) -> VBenchScores:
    return VBenchScores(dict(zip(COLUMNS, raw)), dict.fromkeys(COLUMNS))


def write_results(directory: Path, raw: Mapping[str, Any], *, together: bool = False) -> Path:
    """As the scorer leaves them: one file for each dimension, or one for all."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = {name: [value, [{"video_path": "v", "video_results": value}] * 7] for name, value in raw.items()}
    for number, part in enumerate([entries] if together else [{name: entry} for name, entry in entries.items()]):
        (directory / f"results_{number}{RESULTS}").write_text(json.dumps(part))
        (directory / f"results_{number}_full_info.json").write_text("[]")
    return directory


def random_raw() -> dict[str, float]:
    return {name: random.random() for name in DIMENSIONS}


@pytest.mark.parametrize("model", LEADERBOARD)
def test_the_leaderboard_is_reproduced(model: str) -> None:
    published = [float(value) for value in LEADERBOARD[model].split()]
    means = scores_of([value / 100 for value in published[3:]]).means()
    assert [100 * mean for mean in means.values()] == pytest.approx([*published[1:3], published[0]], abs=0.01), (
        "to the rounding of the raw scores"
    )


def test_total_of_the_paper() -> None:
    assert total_score(84.87, 71.27) == pytest.approx(82.15, abs=1e-9)


def test_bounds_and_weights() -> None:
    assert list(scores_of(LOW).means().values()) == pytest.approx([0, 0, 0], abs=1e-12)
    assert list(scores_of(HIGH).means().values()) == pytest.approx([1, 1, 1])
    for index, name in enumerate(COLUMNS):
        one = scores_of([high if place == index else low for place, (low, high) in enumerate(zip(LOW, HIGH))])
        assert one.normalized(name) == pytest.approx(1)
        share = [0, 1 / 9] if index >= 7 else [(0.5 if name == "dynamic_degree" else 1) / 6.5, 0]
        assert list(one.means().values()) == pytest.approx([*share, 0.8 * share[0] + 0.2 * share[1]], abs=1e-12)
    beyond = scores_of([2 * high - low for low, high in zip(LOW, HIGH)])
    assert list(beyond.means().values()) == pytest.approx([2, 2, 2]), "nothing is clipped"


def test_total_of_a_directory_of_one_file_and_of_named_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = random_raw()
    expected = scores_of([raw[name] for name in COLUMNS]).means()
    split = write_results(tmp_path / "run" / "results", raw)
    joined = write_results(tmp_path / "joined" / "results", {name.replace("_", " "): raw[name] for name in raw}, together=True)
    for given in ([split], [joined], sorted(split.glob(f"*{RESULTS}"))):
        status, _, out = command(capsys, "total", *given, "--out", tmp_path / "out")
        (document,) = json.loads((tmp_path / "out" / "vbench.json").read_text()).values()
        assert status == 0 and out == (tmp_path / "out" / "vbench.md").read_text()
        assert {name: document[name] for name in expected} == pytest.approx(expected)
        assert {name: entry["raw"] for name, entry in document["dimensions"].items()} == raw
        assert f"{100 * expected['Total']:.2f}" in out.splitlines()[-1] and len({len(line) for line in out.splitlines()}) == 1
        assert "| 7 |" in " ".join(out.splitlines()[2].split()), "how many videos the mean is of"
    assert command(capsys, "total", split)[0] == 0 and (tmp_path / "run" / "vbench.md").is_file(), "beside the results, not among them"


def test_two_results_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = random_raw(), random_raw()
    directories = [write_results(tmp_path / name / "results", raw) for name, raw in {"base": before, "lora": after}.items()]
    status, _, out = command(capsys, "total", *directories, "--out", tmp_path)
    rows = {cells[1].strip(): cells[2:5] for line in out.splitlines()[2:] if (cells := line.split("|"))}
    assert status == 0 and list(rows) == [*DIMENSIONS, "**Quality**", "**Semantic**", "**Total**"]
    for name in DIMENSIONS:
        values = [before[name], after[name], after[name] - before[name]]
        assert [float(cell) for cell in rows[name]] == pytest.approx([100 * value for value in values], abs=0.006)
    totals = [scores_of([raw[name] for name in COLUMNS]).means()["Total"] for raw in (before, after)]
    assert float(rows["**Total**"][2]) == pytest.approx(100 * (totals[1] - totals[0]), abs=0.006)


def test_a_missing_dimension_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = random.sample(list(DIMENSIONS), 2)
    results = write_results(tmp_path / "results", {name: value for name, value in random_raw().items() if name not in missing})
    status, said, out = command(capsys, "total", results)
    assert status == 2 and not out and "there is no total without" in said[-1] and all(name in said[-1] for name in missing)
    assert not (tmp_path / "vbench.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 62.9, -1.2, None, "high"])
def test_a_score_that_is_no_fraction_is_refused(value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write_results(tmp_path / "results", random_raw() | {"imaging_quality": value}, together=True)
    status, said, _ = command(capsys, "total", results)
    assert status == 2 and len(said) == 1 and "results_0_eval_results.json" in said[0]


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    raw = random_raw()
    files = sorted(write_results(tmp_path, raw).glob(f"*{RESULTS}"))
    assert read_scores([*files, files[3]]).raw == raw
    (tmp_path / "more.json").write_text(json.dumps({"color": [raw["color"] / 2, []]}))
    with pytest.raises(UserError, match="both have color"):
        read_scores([*files, tmp_path / "more.json"])
    (tmp_path / "more.json").write_text(json.dumps({"colour": [0.5, []]}))
    with pytest.raises(UserError, match="'colour'"):
        read_scores([*files, tmp_path / "more.json"])


# Prompts, names and seeds


def test_every_prompt_once_with_all_of_its_dimensions(tmp_path: Path) -> None:
    info = read_info(write_info(tmp_path / "info.json"))
    lines = [json.loads(line) for line in manifest(info, None, 3).splitlines()]
    assert info == INFO and [line["prompt"] for line in lines] == [RED, BLUE, GREEN]
    assert lines[1]["dimensions"] == ["color", "object_class", "overall_consistency"]
    assert [len(line["videos"]) for line in lines] == [25, 5, 5]
    assert [video["file"] for video in lines[2]["videos"]] == [f"{GREEN}-{index}.mp4" for index in range(5)]
    chosen = videos_of(manifest(info, None, 3, 2), ["dynamic_degree", "color"])
    assert [video.file for video in chosen] == [f"{prompt}-{index}.mp4" for prompt in (BLUE, GREEN) for index in range(2)]


def test_a_seed_depends_on_prompt_and_index_alone() -> None:
    seed = random.randrange(2**32)

    def seeds(info: Sequence[Prompt], seed: int, per_prompt: int = 5) -> dict[str, int]:
        return {video.file: video.seed for video in videos_of(manifest(info, None, seed, per_prompt), list(DIMENSIONS))}

    whole = seeds(INFO, seed)
    assert len(set(whole.values())) == len(whole) == 35 and all(0 <= value < 2**32 for value in whole.values())
    part = seeds(INFO[:1:-1], seed, 3)
    assert part and part.items() <= whole.items()
    assert not set(seeds(INFO, seed + 1).values()) & set(whole.values())
    bits = np.unpackbits(np.array([video_seed(seed, "p", index) for index in range(2000)], dtype=np.uint32).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.01


def test_extended_prompts_follow_their_lines(tmp_path: Path) -> None:
    lines, list_file, originals = ["one \u2028 line", "two", "three", "two again"], tmp_path / "extended.txt", tmp_path / "originals.txt"
    list_file.write_text("\n".join(lines) + "\n\n")
    expected = {RED: "one \u2028 line", BLUE: "two", GREEN: "three"}
    assert read_extended(list_file, INFO) == expected
    videos = videos_of(manifest(INFO, expected, 0), ["color"])
    assert {video.text for video in videos} == {"two"} and videos[0].file == f"{BLUE}-0.mp4", "named by the original"
    originals.write_text(f"{GREEN} \n{RED}\nsomething else\n{BLUE}\n")
    assert read_extended(list_file, INFO, originals) == {GREEN: "one \u2028 line", RED: "two", BLUE: "two again"}
    for content, problem in {"one\ntwo\nthree\n": "3 lines", "one\n\nthree\nfour\n": "line 2 of"}.items():
        list_file.write_text(content)
        with pytest.raises(UserError, match=problem):
            read_extended(list_file, INFO)
    list_file.write_text("\n".join(lines))
    originals.write_text(f"{GREEN}\n{RED}\nx\ny\n")
    with pytest.raises(UserError, match="lacks 2 of VBench's prompts: 'a blue square"):
        read_extended(list_file, INFO, originals)


@pytest.mark.parametrize("prompt", ["a cat and/or a dog", "ä" * 125])
def test_prompts_that_cannot_be_names_are_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a file"):
        manifest([Prompt(prompt, ("color",))], None, 0)
    manifest([Prompt("x" * 230, ("color",))], None, 0)


@pytest.mark.parametrize("content", ["no JSON", "{}", '[{"prompt": "x"}]', '[{"prompt_en": "x", "dimension": ["Human_Anatomy"]}]', None])
def test_another_file_is_not_taken_for_the_prompts(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="VBench_full_info.json"):
        read_info(path)


# Making the videos


def decoded(path: Path) -> NDArray[np.float64]:
    """[F, H, W, 3]"""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def sample(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> tuple[int, list[str]]:
    info = write_info(out.parent / "info.json")
    status, said, printed = command(capsys, "sample", *FAST, "--info", info, "--videos", 1, "--out", out, *arguments)
    assert printed == (f"{out}/videos\n" if status == 0 else "")
    return status, said


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "videos").iterdir()}


def test_the_videos_are_those_of_their_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = sample(capsys, tmp_path / "out", "--seed", random.randrange(2**32), "--batch", 3, "video.chunks=2")
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    videos = [(line["prompt"], video) for line in lines for video in line["videos"]]
    assert status == 0 and set(contents(tmp_path / "out")) == {video["file"] for _, video in videos} and len(videos) == 7
    config = load_config("toy", [*FAST, "video.chunks=2"])
    generator = load_generator(config)
    engine = sized_engine(config, generator, 1, longer=False)
    made = []
    for prompt, video in random.sample(videos, 3):
        noise = KeyedNoise(engine.shape, GroupId(video["seed"]))
        frames = torch.cat(list(stream_frames(generator, engine, generator.encode_text([prompt]), noise)), dim=1)[0]
        made.append(decoded(tmp_path / "out" / "videos" / video["file"]))
        assert made[-1].shape == (13, 64, 64, 3), "not enlarged"
        assert np.abs(made[-1] - 255 * frames.permute(0, 2, 3, 1).numpy()).mean() < 4
    assert min(np.abs(made[a] - made[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))) > 4


def test_shards_make_the_same_videos_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(capsys, tmp_path / "whole")[0] == 0
    assert sample(capsys, tmp_path / "parts", "--shard", "1/2")[0] == 0
    first = contents(tmp_path / "parts")
    assert len(first) == 3
    assert sample(capsys, tmp_path / "parts", "--dimensions", "dynamic_degree,color")[0] == 0
    assert sample(capsys, tmp_path / "parts", "--shard", "0/2")[0] == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole") and len(contents(tmp_path / "whole")) == 7
    assert (tmp_path / "parts" / "manifest.jsonl").read_bytes() == (tmp_path / "whole" / "manifest.jsonl").read_bytes()


def test_what_is_there_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    extend, calls = Engine.extend, []

    def interrupting(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return extend(*arguments, **keywords)

    monkeypatch.setattr(Engine, "extend", interrupting)
    status, said = sample(capsys, tmp_path / "out", "--batch", 2)
    assert status == 130 and "4 of 7 videos are made" in said[-1]
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "videos").iterdir()}
    assert len(there) == 4
    assert sample(capsys, tmp_path / "out", "--batch", 2)[0] == 0 and len(calls) == 4
    assert {path: path.stat().st_mtime_ns for path in there} == there and len(contents(tmp_path / "out")) == 7
    assert sample(capsys, tmp_path / "out")[0] == 0 and len(calls) == 4


def test_a_video_that_could_not_be_written_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = Mp4Writer.append, []

    def failing(*arguments: Any) -> None:
        calls.append(None)
        append(*arguments)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mp4Writer, "append", failing)
    status, said = sample(capsys, tmp_path / "out", "video.chunks=2", "--batch", 2)
    assert status == 2 and "the disk is full" in said[-1] and len(contents(tmp_path / "out")) == 2


def test_other_videos_need_another_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = add_lora(load_model(checkpoint_path("toy")), rank=2, alpha=4.0, targets=BLOCK_TARGETS, seed=0)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    save_adapter(tmp_path / "adapter", model, base_model="toy")
    (tmp_path / "extended.txt").write_text("\n".join([GREEN, RED, BLUE, RED]))
    out, one = tmp_path / "out", ["--dimensions", "object_class"]
    assert sample(capsys, out, *one)[0] == 0
    before = contents(out)
    record = json.loads((out / "sampling.json").read_text())
    assert record["sources"]["prompts"]["path"] == str(tmp_path / "info.json") and record["sources"]["extended"] is None
    lora = ["--lora", tmp_path / "adapter"]
    updated = {part: tmp_path / f"another_{part}" for part in ("vae", "text")}
    for part, checkpoint in updated.items():
        shutil.copytree(checkpoint_path("toy"), checkpoint)
        (file,) = (checkpoint / part).glob("*.safetensors")
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata=metadata)
    for arguments, differing in [
        (["--seed", 1], "manifest"),
        (["--extended", tmp_path / "extended.txt"], "manifest"),
        (["video.chunks=2"], "video"),
        (["sampler.steps=[900]"], "sampler"),
        (lora, "weights"),
        ([f"generator.checkpoint={updated['vae']}"], "vae_weights"),
        ([f"generator.checkpoint={updated['text']}"], "text_encoder"),
    ]:
        status, said = sample(capsys, out, *one, *arguments)
        assert (
            status == 2 and re.search(rf"\): {differing}(\.\w+)?: [^;]* there; give another --out$", said[-1]) and contents(out) == before
        ), arguments
    made = [before]
    for name, arguments in {
        "extended": ["--extended", tmp_path / "extended.txt"],
        "lora": lora,
        "half": [*lora, "--lora-scale", 0.5],
    }.items():
        assert sample(capsys, tmp_path / name, *one, "toy", *arguments)[0] == 0
        made.append(contents(tmp_path / name))
        assert made[-1].keys() == before.keys()
    assert len({made[index][f"{BLUE}-0.mp4"] for index in range(4)}) == 4
    record = json.loads((tmp_path / "extended" / "sampling.json").read_text())["sources"]["extended"]
    assert record["path"].endswith("extended.txt") and len(record["sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected python -m arcopo_fast.vbench sample, score, total"),
        (["sampel"], "given sampel"),
        (["sample"], "VBench_full_info.json"),
        (["sample", "--info", "nowhere.json"], "nowhere.json"),
        (["sample", "--python", "nowhere/python"], "cannot run"),
        (["sample", "--info", "info.json", "--dimensions", "colour"], "there is no dimension 'colour'"),
        (["sample", "--info", "info.json", "--shard", "2/2"], "--shard: expected I/N"),
        (["sample", "--info", "info.json", "--lora-scale", "0.5"], "name it with --lora"),
        (["sample", "--info", "info.json", "--originals", "info.json"], "--originals says what --extended extends"),
        (["sample", "--info", "info.json", "--out", "info.json/videos"], "is not a directory"),
        (["sample", "--info", "info.json", "--videos", "0"], "--videos: expected a whole number"),
        (["score", "--videos", "."], "--python"),
        (["score", "--videos", ".", "--python", sys.executable], "has no vbench"),
        (["total", "nowhere"], "cannot read results from nowhere"),
        (["total", ".", "."], "there is no total without subject_consistency"),
        (["total", ".", "info.json"], "expected one directory of results"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ARCOPO_MODELS", str(tmp_path))
    write_info(tmp_path / "info.json")
    status, said, out = command(capsys, *arguments)
    assert status == 2 and len(said) == 1 and expected in said[0], said
    assert not out and [path.name for path in tmp_path.iterdir()] == ["info.json"]


def test_the_prompts_come_from_where_published_files_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCOPO_MODELS", str(tmp_path))
    (tmp_path / "Vchitect" / "VBench" / "vbench").mkdir(parents=True)
    write_info(tmp_path / "Vchitect" / "VBench" / "vbench" / "VBench_full_info.json", INFO[1:2])
    status, _, _ = command(capsys, "sample", *FAST, "--videos", 1, "--out", tmp_path / "out")
    assert status == 0 and list(contents(tmp_path / "out")) == [f"{BLUE}-0.mp4"]


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
        """What was run since the last time."""
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

    def score(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
        return command(capsys, "score", "--python", self.python, "--videos", self.videos, *arguments)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_every_dimension_is_scored_once(
    environment: Environment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    status, said, out = environment.score(capsys)
    assert status == 0 and out == f"{environment.results}\n", said
    assert environment.calls() == [name for dimension in DIMENSIONS for name in ["static_filter"] * (dimension == FLICKERING) + [dimension]]
    scores = read_scores(list(environment.results.glob(f"*{RESULTS}")))
    assert scores.raw == pytest.approx({name: environment.expected(name) for name in DIMENSIONS})
    assert scores.videos["color"] == 5 and scores.videos["dynamic_degree"] == 10
    assert f"line 29 of {COLUMNS[0]}" in (environment.results / f"{COLUMNS[0]}.log").read_text()
    documents = [json.loads(path.read_text()) for path in environment.results.rglob("*.json")]
    assert len(documents) == 16 and all(isinstance(entry[0], float) for part in documents for entry in part.values()), "and nothing else"
    assert command(capsys, "total", environment.results)[0] == 0
    status, said, _ = environment.score(capsys)
    assert status == 0 and environment.calls() == [] and len(said) == 16


def test_what_is_missing_or_out_of_date_is_scored_again(environment: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["color", "scene", "dynamic_degree", FLICKERING]
    arguments = ["--dimensions", ",".join(chosen), "--ngpus", 2]
    assert environment.score(capsys, *arguments)[0] == 0
    environment.calls()
    (environment.results / f"color{RESULTS}").unlink()
    os.utime(environment.videos / "a prompt of dynamic_degree-3.mp4")
    assert environment.score(capsys, *arguments)[0] == 0
    assert environment.calls() == ["color", "dynamic_degree"]
    os.utime(environment.videos / f"a prompt of {FLICKERING}-24.mp4")
    assert environment.score(capsys, *arguments)[0] == 0
    assert environment.calls() == ["static_filter", FLICKERING]


def test_one_that_fails_does_not_stop_the_others(environment: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dimensions", "color,object_class,scene"]
    (environment.site / "fails").write_text("object_class")
    status, said, out = environment.score(capsys, *arguments)
    assert status == 2 and not out and "not scored: object_class" in said[-1]
    log = environment.results / "object_class.log"
    assert "RuntimeError: no detectron2 here" in said and "line 29 of object_class" in said and "line 2 of object_class" not in said
    assert any(str(log) in line for line in said) and "line 2 of object_class" in log.read_text().splitlines()
    assert environment.calls() == ["color", "object_class", "scene"]
    (environment.site / "fails").unlink()
    assert environment.score(capsys, *arguments)[0] == 0 and environment.calls() == ["object_class"]
    assert not [path for path in environment.results.iterdir() if path.name.startswith(".")]


def test_missing_videos_are_named_before_anything_runs(environment: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    (environment.videos / "a prompt of color-4.mp4").unlink()
    status, said, _ = environment.score(capsys, "--dimensions", "color")
    assert status == 2 and "1 of 5 videos are not in" in said[0] and "a prompt of color-4.mp4" in said[0] and not environment.calls()
    assert environment.score(capsys, "--dimensions", "color", "--per-prompt", 4)[0] == 0 and environment.calls() == ["color"]
    (environment.videos / "notes.txt").write_text("")
    status, said, _ = environment.score(capsys, "--dimensions", "scene")
    assert status == 2 and "holds notes.txt" in said[0] and not environment.calls()


def test_videos_that_all_move_have_no_flickering(environment: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    for name in environment.static:
        (environment.videos / name).write_text("0.5 moving")
    status, said, _ = environment.score(capsys, "--dimensions", FLICKERING)
    assert status == 2 and any("none of its videos is static" in line for line in said) and environment.calls() == ["static_filter"]


def test_the_prompts_can_come_from_the_environment(environment: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_info(environment.site / "vbench" / "VBench_full_info.json", INFO[1:2])
    for python in (environment.python, environment.site):
        status, said, _ = command(capsys, "sample", *FAST, "--python", python, "--videos", 1, "--out", tmp_path / "out")
        assert status == 0 and list(contents(tmp_path / "out")) == [f"{BLUE}-0.mp4"], said
