"""`python -m arcopo_fast.evaluate` that is killed, interrupted, shared by processes or cut in shards: what is scored stays scored, once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.commands import outcome
from support.evaluations import CAPTIONS, SMALL, THREE, lines_in, lines_in_bytes, results_in, scores_in, whole

from arcopo_fast import evaluate
from arcopo_fast.evaluation import evaluator
from arcopo_fast.evaluation.scores import BASE, ScoreDirectory, Video
from arcopo_fast.rewards.base import FramesNotFinite
from arcopo_fast.rewards.client import RewardServerError

# Importing torch takes seconds, so one process imports it and forks the workers, before it has computed anything.
command = partial(outcome, evaluate.main)

TWO = """
import os, sys
from arcopo_fast import evaluate
from arcopo_fast.cli import run_command
folder, *arguments = sys.argv[1:]
children = []
for worker in range(2):
    child = os.fork()
    if not child:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{worker}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
        status = run_command(evaluate.main, arguments)
        os._exit(status)
    children.append(child)
print(*children, flush=True)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_killed_in_the_midst_two_processes_go_on_bit_for_bit(evaluated: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """They share what is left about evenly, make nothing twice, and the result is that of one process that was not disturbed."""
    out = tmp_path / "out"
    call = [*whole(adapters), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "arcopo_fast.evaluate", *call], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(out.glob("scores/*.jsonl"))) < 1 or len(lines_in_bytes(out)) < 6:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (file,) = out.glob("scores/*.jsonl")
    content = file.read_bytes()
    file.write_bytes(content[: content.rstrip(b"\n").rfind(b"\n") + 20])  # as if the kill had come inside a line: a batch is half there
    kept = scores_in(out).values
    assert 5 <= len(kept) < 30 and len(kept) not in (4, 6, 10, 12), "the test needs a batch of which a part is missing"
    assert not (out / "results.json").exists()

    with subprocess.Popen([sys.executable, "-c", TWO, str(tmp_path), *call], stdout=subprocess.PIPE, text=True) as process:
        children, ends = (line.split() for line in process.communicate(timeout=120)[0].splitlines())
    for worker in range(2):
        said = (tmp_path / f"{worker}.err").read_text()
        assert ends[worker] == "0" and said.splitlines()[0].endswith(" of 30 videos are scored already"), said
        assert "left to other processes" not in said and f"results: {out / 'results.json'}" in (tmp_path / f"{worker}.out").read_text()
    made = [sum(file.read_bytes().count(b"\n") for file in out.glob(f"scores/*-{child}-*")) for child in children]
    assert sum(made) == 30 - len(kept) and min(made) >= 6, made
    values = scores_in(out).values
    assert values == scores_in(evaluated).values and {video: values[video] for video in kept} == kept
    written = lines_in_bytes(out)
    assert len(written) == len(set(written)) == 30
    for name in ("results.json", "table.md"):
        assert (out / name).read_bytes() == (evaluated / name).read_bytes()
    videos = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.mp4")}
    assert videos == {path.relative_to(evaluated): path.read_bytes() for path in evaluated.rglob("*.mp4")}


def test_interrupted_it_finishes_the_batch_and_goes_on_with_more(
    adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original, made = tmp_path / "out", evaluator.Evaluator.score, []

    def score(self: evaluator.Evaluator, videos: Any, files: Any) -> Any:
        if len(made) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        made.append([*videos])
        return original(self, videos, files)

    monkeypatch.setattr(evaluator.Evaluator, "score", score)
    call = [*SMALL, *THREE, "--batch", "2", "--keep-videos", "1", "--out", out]
    status, said, printed = command(capsys, *call)
    assert (status, printed) == (130, "") and "finishing the batch first" in said[-2] and "2 of 3 batches" in said[-1]
    assert "the same command continues" in said[-1] and len(scores_in(out).values) == 4
    assert command(capsys, *call)[0] == 0 and len(made) == 3
    assert sorted(video.name[:4] for video in (out / "videos" / BASE).iterdir()) == ["0000", "0000"]

    # everything is there: nothing is made. Then with an adapter, and with more prompts of a set that begins with the same ones
    assert command(capsys, *call)[0] == 0 and len(made) == 3
    assert command(capsys, *call, "--adapter", adapters["on"])[0] == 0 and {videos[0].generator for videos in made[3:]} == {"on@1"}
    more = tmp_path / "more.txt"
    more.write_text("\n".join([*(prompt.text for prompt in scores_in(out).prompts.values()), CAPTIONS[0]]))
    assert command(capsys, *call, "--prompts", more)[0] == 0 and [videos[0].prompt for videos in made[6:]] == [3]
    assert {one["videos"] for one in results_in(out)} == {8}


def hold(out: Path, videos: list[Video], held: Any) -> None:
    """Act as another process that is making a batch and never ends."""
    for _ in ScoreDirectory.open(out).unscored([videos], lambda others: None):
        held.set()
        time.sleep(600)


def test_waiting_for_another_process_can_be_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = [*SMALL, *THREE, "--batch", "2", "--keep-videos", "none", "--out", tmp_path]
    assert command(capsys, *call, "--shard", "0/2")[0] == 0 and len(scores_in(tmp_path).values) == 4
    context, sleep = multiprocessing.get_context("fork"), time.sleep
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path, [Video(BASE, 1, 0), Video(BASE, 1, 1)], held))
    other.start()
    try:
        assert held.wait(60)

        def interrupted(seconds: float) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            sleep(seconds)

        with monkeypatch.context() as patched:
            patched.setattr(time, "sleep", interrupted)
            status, said, printed = command(capsys, *call)
        assert (status, printed) == (130, "") and "waiting for 1 batches that other processes are making" in said
        assert said[-1] == "interrupted; 0 of 1 batches are scored and kept; the same command continues"
    finally:
        other.kill()
        other.join(60)
    assert command(capsys, *call)[0] == 0 and len(lines_in(tmp_path)) == 6


def test_a_server_that_stays_away_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = evaluator.judge, []

    def judge(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RewardServerError("the reward server at http://127.0.0.1:1 could not be used for 60 min")
        return original(*arguments, **settings)

    def breaks(*arguments: Any, **settings: Any) -> Any:
        raise FramesNotFinite("video 0 has frames that are not finite")

    monkeypatch.setattr(evaluator, "judge", judge)
    call = [*SMALL, *THREE, "--batch", "4", "--keep-videos", "none", "--out", tmp_path]
    status, said, _ = command(capsys, *call)
    assert status == 2 and "60 min; what is scored is kept, and the same command continues" in said[-1]
    assert len(scores_in(tmp_path).values) == 4
    with monkeypatch.context() as patched:
        patched.setattr(evaluator, "judge", breaks)
        status, said, _ = command(capsys, *call)
    assert status == 2 and said[-1] == f"error: {BASE}: video 0 has frames that are not finite; what is scored is kept"
    assert command(capsys, *call)[0] == 0 and len(calls) == 3 and len(lines_in(tmp_path)) == 6


def test_two_shards_make_up_one_evaluation(
    evaluated: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In directories of their own, merged; and into one directory, where the one that comes last writes the table."""
    call = whole(adapters)
    for number in (1, 0):
        status, said, printed = command(capsys, *call, "--shard", f"{number}/2", "--out", tmp_path / f"part{number}")
        assert (status, printed) == (0, "") and "left to other processes" in said[-1] and not (tmp_path / f"part{number}/table.md").exists()
    shutil.copytree(tmp_path / "part1", tmp_path / "torn")
    (file,) = (tmp_path / "torn").glob("scores/*.jsonl")
    file.write_bytes(file.read_bytes()[:-9])
    status, said, printed = command(capsys, "merge", tmp_path / "torn", "--out", tmp_path / "torn")
    assert status == 0 and said == ["zero@1 lacks 1 of 2 videos"] and "| 1      |" in printed
    status, said, printed = command(capsys, "merge", tmp_path / "part0", tmp_path / "part1", "--out", tmp_path / "merged")
    assert (status, said) == (0, []) and "| reward" in printed
    assert scores_in(tmp_path / "merged").values == scores_in(evaluated).values
    by_name = {(one["generator"], one["score"]): one for one in results_in(evaluated)}
    assert {(one["generator"], one["score"]): one for one in results_in(tmp_path / "merged")} == by_name

    shutil.copytree(tmp_path / "part0", tmp_path / "shared")
    status, said, printed = command(capsys, *call, "--shard", "1/2", "--out", tmp_path / "shared")
    assert status == 0 and "| reward" in printed
    for name in ("results.json", "table.md"):
        assert (tmp_path / "shared" / name).read_bytes() == (evaluated / name).read_bytes()
