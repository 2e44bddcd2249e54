"""Scores on disk: nothing that was flushed is lost, nothing counts twice, and what does not belong together is refused."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from arcopo_fast.data.prompts import Prompt
from arcopo_fast.errors import UserError
from arcopo_fast.runtime.scores import BASE, ScoreDirectory, Scores, ScoreWriter, Video

SETTINGS = {"seed": 7, "sampler.steps": (1000, 500), "rewards.beauty": 1.0}
PROMPTS = [Prompt("an owl\u2028at night"), Prompt("süße Katze", "a sweet cat, sitting")]
ADAPTERS: dict[str, dict[str, Any] | None] = {BASE: None, "on@0.5": {"sha256": "ab" * 32, "alpha": 8.0, "scale": 0.5}}


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(torch.initial_seed())


def some(*places: tuple[str, int, int]) -> dict[Video, dict[str, float]]:
    return {Video(*place): {"beauty": random.random(), "motion": random.gauss(0, 1e-9)} for place in places}


def write(directory: ScoreDirectory, *parts: dict[Video, dict[str, float]]) -> Path:
    """The file of a process that scored some batches."""
    before = set((directory.path / "scores").iterdir())
    with ScoreWriter(directory) as writer:
        for part in parts:
            writer.append([(video, PROMPTS[video.prompt], scores) for video, scores in part.items()], ADAPTERS)
    (file,) = set((directory.path / "scores").iterdir()) - before
    return file


@pytest.fixture
def directory(tmp_path: Path) -> ScoreDirectory:
    return ScoreDirectory.create(tmp_path / "evaluation", SETTINGS)


def test_what_is_written_is_read(directory: ScoreDirectory) -> None:
    assert directory.read() == Scores()
    first, second = some((BASE, 0, 0), (BASE, 0, 1)), some((BASE, 1, 0), ("on@0.5", 1, 1))
    third = some(("on@0.5", 0, 0))
    third[Video("on@0.5", 0, 0)]["beauty"] = random.choice([math.nan, math.inf])
    file = write(directory, first, second)
    write(directory, third)
    again = ScoreDirectory.create(directory.path, SETTINGS)
    assert again.settings == directory.settings and again.fingerprint == directory.fingerprint
    found = again.read()
    assert {v: s for v, s in found.values.items() if v not in third} == first | second
    assert math.isnan(found.values[Video("on@0.5", 0, 0)]["beauty"])
    assert found.prompts == dict(enumerate(PROMPTS)) and found.adapters == ADAPTERS and found.of(BASE).keys() == {*first, Video(BASE, 1, 0)}
    for line in file.read_bytes().decode().split("\n")[:-1]:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_file_cut_anywhere_loses_its_torn_line_only(directory: ScoreDirectory) -> None:
    scores = some(*((BASE, 0, number) for number in range(5)))
    file = write(directory, scores)
    content = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for cut in {*random.sample(range(len(content)), 40), *ends, *(end - 1 for end in ends), 0}:
        file.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        assert directory.read().values == dict(list(scores.items())[:whole])
    file.write_bytes(content[:-3])
    more = some((BASE, 1, 0))
    write(directory, more)  # into a file of its own: the torn line stays the last one of its file
    assert directory.read().values == dict(list(scores.items())[:-1]) | more


def test_the_first_line_of_a_video_counts(directory: ScoreDirectory) -> None:
    files = sorted((write(directory, some((BASE, 0, 0))), write(directory, some((BASE, 0, 0)))))
    first = json.loads(files[0].read_bytes())["scores"]
    assert directory.read().values == {Video(BASE, 0, 0): first}


def _process(path: Path, number: int, barrier: Any) -> None:
    directory = ScoreDirectory.open(path)
    with ScoreWriter(directory) as writer:
        barrier.wait()
        for index in range(20):
            writer.append([(Video(BASE, number % 2, 20 * number + index), PROMPTS[number % 2], {"beauty": number + index / 64})], ADAPTERS)
            if number == 3 and index == 10:
                os._exit(9)


def test_several_processes_at_once(directory: ScoreDirectory) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_process, args=(directory.path, number, barrier)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 9]
    expected = {
        Video(BASE, number % 2, 20 * number + index): {"beauty": number + index / 64}
        for number in range(4)
        for index in range(20 if number < 3 else 11)
    }
    assert directory.read().values == expected


def test_a_full_disk_leaves_whole_batches(directory: ScoreDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (some((BASE, 0, number), (BASE, 1, number)) for number in range(3))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ScoreWriter(directory) as writer:
        for part in (first, second, third):
            with monkeypatch.context() as patched:
                if part is second:
                    patched.setattr(os, "fsync", full)
                lines = [(video, PROMPTS[video.prompt], scores) for video, scores in part.items()]
                if part is second:
                    with pytest.raises(OSError, match="No space"):
                        writer.append(lines, ADAPTERS)
                    assert directory.read().values == first
                else:
                    writer.append(lines, ADAPTERS)
    assert directory.read().values == first | third


def test_nothing_scored_makes_no_file(directory: ScoreDirectory) -> None:
    with ScoreWriter(directory):
        pass
    assert not list((directory.path / "scores").iterdir())


# What does not belong together


def test_other_settings_are_refused_by_name(directory: ScoreDirectory, tmp_path: Path) -> None:
    for change, said in (
        ({"seed": 8}, "seed 7, and here it is 8;"),
        ({"rewards.motion": 1.0}, "rewards.motion absent, and here it is 1.0"),
    ):
        with pytest.raises(UserError, match=said):
            ScoreDirectory.create(directory.path, SETTINGS | change)
    with pytest.raises(UserError, match=r"\(and 1 more\)"):
        ScoreDirectory.create(directory.path, SETTINGS | {"seed": 8, "rewards.beauty": 2.0})
    other = ScoreDirectory.create(tmp_path / "other", SETTINGS | {"seed": 8})
    with pytest.raises(UserError, match=f"seed 7, and in {other.path} it is 8"):
        directory.add_files(other)
    # and so is a file that was copied by hand
    shutil.copy(write(other, some((BASE, 0, 0))), directory.path / "scores" / "copied.jsonl")
    with pytest.raises(UserError, match=r"copied.jsonl:1: of an evaluation with other settings"):
        directory.read()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "a dog"}, "prompt 0 is 'a dog'"),
        ({"extended": "a long dog"}, "prompt 0 is"),
        ({"adapter": {"sha256": "0"}}, "another adapter"),
    ],
)
def test_lines_that_disagree_are_refused(directory: ScoreDirectory, change: dict[str, Any], said: str) -> None:
    file = write(directory, some(("on@0.5", 0, 0), ("on@0.5", 0, 1)))
    first, second = file.read_text().split("\n")[:2]
    file.write_text(first + "\n" + json.dumps(json.loads(second) | change) + "\n")
    with pytest.raises(UserError, match=said):
        directory.read()


@pytest.mark.parametrize("line", [b"", b"[]", b'{"fingerprint": 1}', b"\xff", b"null", b'{"a": '])
def test_a_broken_line_in_the_midst_is_named(directory: ScoreDirectory, line: bytes) -> None:
    file = write(directory, some((BASE, 0, 0), (BASE, 0, 1)))
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(UserError, match=rf"{file.name}:2: not a line of scores"):
        directory.read()


def test_adding_what_contradicts_is_refused(directory: ScoreDirectory) -> None:
    write(directory, some((BASE, 0, 0), ("on@0.5", 1, 0)))
    scores = directory.read()
    directory.check(scores, [*PROMPTS, Prompt("one more")], {**ADAPTERS, "off@1": {"sha256": "c"}})
    directory.check(scores, PROMPTS[:1], {})
    for prompts in ([PROMPTS[1], PROMPTS[0]], [PROMPTS[0], Prompt(PROMPTS[1].text)], [PROMPTS[0], Prompt(PROMPTS[1].text, "else")]):
        with pytest.raises(UserError, match="scores of other prompts: number"):
            directory.check(scores, prompts, ADAPTERS)
    with pytest.raises(UserError, match=r"another on@0.5 \(SHA-256 abababababababab, here cccc"):
        directory.check(scores, PROMPTS, {"on@0.5": {"sha256": "cccc", "alpha": 8.0, "scale": 0.5}})


def test_what_is_no_evaluation(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for path, said in (
        (tmp_path / "run", "is no evaluation"),
        (tmp_path / "none", "is no evaluation"),
        (tmp_path / "run/config.yaml", "no"),
    ):
        with pytest.raises(UserError, match=said):
            ScoreDirectory.open(path)
    with pytest.raises(UserError, match="something else than an evaluation"):
        ScoreDirectory.create(tmp_path / "run", SETTINGS)
    directory = ScoreDirectory.create(tmp_path / "fine", SETTINGS)
    stamp = directory.path / "evaluation.json"
    for content, said in ((b"{", "is damaged"), (b'{"format": 1}', "is damaged"), (b'{"format": 2, "settings": {}}', "format 2")):
        stamp.write_bytes(content)
        with pytest.raises(UserError, match=said):
            ScoreDirectory.create(directory.path, SETTINGS)


# Merging


def test_merging_is_copying(directory: ScoreDirectory, tmp_path: Path) -> None:
    other = ScoreDirectory.create(tmp_path / "other", SETTINGS)
    here, there = some((BASE, 0, 0)), some((BASE, 0, 1), ("on@0.5", 0, 0))
    write(directory, here)
    file = write(other, there)
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])  # a process that is still writing
    directory.add_files(other)
    assert directory.read().values == here | dict(list(there.items())[:1])
    file.write_bytes(whole)
    for _ in range(2):  # a second time changes nothing
        directory.add_files(other)
        assert directory.read().values == here | there and len(list((directory.path / "scores").iterdir())) == 2
    file.write_bytes(whole[:-5])  # an older state does not replace the newer one
    directory.add_files(other)
    assert directory.read().values == here | there
