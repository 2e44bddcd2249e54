"""`python -m arcopo_fast.vbench score`: each dimension once, in the scorer's own environment, with what is missing or out of date."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.commands import outcome
from support.vbench import COLUMNS, Environment

from arcopo_fast import vbench
from arcopo_fast.evaluation.vbench.data import (
    DIMENSIONS,
    FLICKERING,
    RESULTS,
    read_scores,
)


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
    assert outcome(vbench.main, capsys, "total", environment.results)[0] == 0
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
