"""`python -m arcopo_fast.vbench`: its videos, what it says to bad input, and the table of the total."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.commands import outcome
from support.vbench import BLUE, COLUMNS, GREEN, INFO, RED, Environment, random_raw, scores_of, write_info, write_results
from torch import nn

from arcopo_fast import vbench
from arcopo_fast.build import checkpoint_path, load_generator, load_model, sized_engine
from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation.vbench.data import (
    DIMENSIONS,
    RESULTS,
)
from arcopo_fast.evaluation.videos import stream_frames
from arcopo_fast.model.lora import BLOCK_TARGETS, adapter_parameters, add_lora, save_adapter
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise
from arcopo_fast.storage.video import Mp4Writer

FAST = ["sampler.steps=[1000]", "video.chunks=1", "generator.device=cpu"]


command = partial(outcome, vbench.main)


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
        (["sample", "--info", "info.json", "--originals", "info.json"], "--originals names the prompts that --extended extends"),
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


def test_the_prompts_can_come_from_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = Environment(tmp_path)
    write_info(environment.site / "vbench" / "VBench_full_info.json", INFO[1:2])
    for python in (environment.python, environment.site):
        status, said, _ = command(capsys, "sample", *FAST, "--python", python, "--videos", 1, "--out", tmp_path / "out")
        assert status == 0 and list(contents(tmp_path / "out")) == [f"{BLUE}-0.mp4"], said
