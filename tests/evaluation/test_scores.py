"""Scores on disk: nothing that was flushed is lost, nothing counts twice, and what does not belong together is refused."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from arcopo_fast.data.prompts import Prompt
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.scores import BASE, ScoreDirectory, Scores, ScoreWriter, Video, VideoScores

SETTINGS = {"seed": 7, "sampler.steps": (1000, 500), "rewards.beauty": 1.0}
PROMPTS = [Prompt("an owl\u2028at night"), Prompt("süße Katze", "a sweet cat, sitting")]
ADAPTERS: dict[str, dict[str, Any] | None] = {BASE: None, "on@0.5": {"sha256": "ab" * 32, "alpha": 8.0, "scale": 0.5}}


def some(*places: tuple[str, int, int]) -> dict[Video, dict[str, float]]:
    return {Video(*place): {"beauty": random.random(), "motion": random.gauss(0, 1e-9)} for place in places}


def write(directory: ScoreDirectory, *parts: dict[Video, dict[str, float]]) -> Path:
    """The file of a process that scored some batches."""
    before = set((directory.path / "scores").iterdir())
    with ScoreWriter(directory) as writer:
        for part in parts:
            writer.append([(video, PROMPTS[video.prompt], VideoScores(scores)) for video, scores in part.items()], ADAPTERS)
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
            writer.append(
                [(Video(BASE, number % 2, 20 * number + index), PROMPTS[number % 2], VideoScores({"beauty": number + index / 64}))],
                ADAPTERS,
            )
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


# Claims

BATCHES = [
    [Video(name, place // 2, place % 2) for place in range(start, min(start + 3, 10))] for name in ADAPTERS for start in range(0, 10, 3)
]


def _claiming(path: Path, batches: list[list[Video]], barrier: Any, hang: tuple[Video, Any] | None = None) -> None:
    """Scores of each video say which process made it. hang: at the batch that holds this video, saying so."""
    barrier.wait()
    directory = ScoreDirectory.create(path, SETTINGS)
    with ScoreWriter(directory) as writer:
        for batch, scores in directory.unscored(batches, lambda others: time.sleep(0.01)):
            if hang and hang[0] in batch:
                hang[1].set()
                time.sleep(600)
            time.sleep(0.02)
            lines = [(video, Prompt(f"prompt {video.prompt}"), VideoScores({"beauty": float(os.getpid())})) for video in batch]
            writer.append([line for line in lines if line[0] not in scores.values], ADAPTERS)


def _written(path: Path) -> list[Video]:
    lines = [json.loads(line) for file in path.glob("scores/*") for line in file.read_bytes().split(b"\n")[:-1]]
    return [Video(line["generator"], line["prompt"], line["number"]) for line in lines]


def test_processes_that_share_a_directory_share_the_work(tmp_path: Path) -> None:
    """They also create it at the same moment, and cut the videos into batches in different ways."""
    context = multiprocessing.get_context("fork")
    for cut in (BATCHES, [[video] for batch in BATCHES for video in batch]):
        path, barrier = tmp_path / f"evaluation-{len(cut)}", context.Barrier(3)
        processes = [context.Process(target=_claiming, args=(path, batches, barrier)) for batches in (BATCHES, BATCHES, cut)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        scores = ScoreDirectory.open(path).read()
        written = _written(path)
        assert len(written) == len(set(written)) == 20 and {*scores.values} == {video for batch in BATCHES for video in batch}
        made = [sum(parts["beauty"] == process.pid for parts in scores.values.values()) for process in processes]
        assert all(2 <= count <= 12 for count in made) and sum(made) == 20


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_process_that_ended_has_claimed_is_taken_over(directory: ScoreDirectory, end: signal.Signals) -> None:
    context = multiprocessing.get_context("fork")
    claimed, waits = context.Event(), []
    video = random.choice([video for batch in BATCHES for video in batch])
    process = context.Process(target=_claiming, args=(directory.path, BATCHES, context.Barrier(1), (video, claimed)))
    process.start()
    assert claimed.wait(60)
    done = directory.read().values

    def pause(others: int) -> None:
        assert others == 1 and len(directory.read().values) == 20 - len(hanging)
        if not waits:
            threading.Timer(0.05, os.kill, (process.pid, end)).start()
        waits.append(others)
        time.sleep(0.01)

    (hanging,) = (batch for batch in BATCHES if video in batch)
    made = []
    with ScoreWriter(directory) as writer:
        for batch, _ in directory.unscored(BATCHES, pause):
            assert (batch == hanging) == bool(waits)
            writer.append([(video, Prompt(f"prompt {video.prompt}"), VideoScores({"beauty": 0.5})) for video in batch], ADAPTERS)
            made.append(batch)
    process.join(60)
    assert waits and made == [batch for batch in BATCHES if batch[0] not in done and batch != hanging] + [hanging]
    assert len(_written(directory.path)) == len(directory.read().values) == 20


def test_a_batch_is_released_whatever_becomes_of_it(directory: ScoreDirectory) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            for batch, scores in directory.unscored(BATCHES, lambda others: pytest.fail("nobody else is there")):
                assert batch == BATCHES[0] and not scores.values
                raise ZeroDivisionError
    other = multiprocessing.get_context("fork").Process(
        target=_claiming, args=(directory.path, BATCHES, multiprocessing.get_context("fork").Barrier(1))
    )
    other.start()
    other.join(60)
    assert len(directory.read().values) == 20


def test_creating_it_at_once_with_other_settings_leaves_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for race in range(5):
        path, barrier, refused = tmp_path / str(race), context.Barrier(4), context.Value("i", 0)

        def create(seed: int, path: Path = path, barrier: Any = barrier, refused: Any = refused) -> None:
            barrier.wait()
            try:
                ScoreDirectory.create(path, SETTINGS | {"seed": seed})
            except UserError as error:
                assert "holds scores with other settings: seed: " in str(error), error
                with refused.get_lock():
                    refused.value += 1

        processes = [context.Process(target=create, args=(seed,)) for seed in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4 and refused.value == 3


def test_a_full_disk_leaves_whole_batches(directory: ScoreDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (some((BASE, 0, number), (BASE, 1, number)) for number in range(3))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ScoreWriter(directory) as writer:
        for part in (first, second, third):
            with monkeypatch.context() as patched:
                if part is second:
                    patched.setattr(os, "fsync", full)
                lines = [(video, PROMPTS[video.prompt], VideoScores(scores)) for video, scores in part.items()]
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
        ({"seed": 8}, "settings: seed: 8 here, 7 there;"),
        ({"rewards.motion": 1.0}, "rewards.motion: 1.0 here, nothing there"),
    ):
        with pytest.raises(UserError, match=said):
            ScoreDirectory.create(directory.path, SETTINGS | change)
    with pytest.raises(UserError, match="rewards.beauty: 2.0 here, 1.0 there; seed: 8"):
        ScoreDirectory.create(directory.path, SETTINGS | {"seed": 8, "rewards.beauty": 2.0})
    other = ScoreDirectory.create(tmp_path / "other", SETTINGS | {"seed": 8})
    with pytest.raises(UserError, match=f"seed: 8 in {other.path}, 7 in {directory.path};"):
        directory.add_files(other)
    # and so is a file that was copied by hand
    shutil.copy(write(other, some((BASE, 0, 0))), directory.path / "scores" / "copied.jsonl")
    with pytest.raises(UserError, match=r"copied.jsonl:1: belongs to an evaluation with other settings"):
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


NONSENSE = (None, True, -1, 0.5, 10**400, "x", "7", "", [], [1], {}, {"x": None}, [[]] * 50, "\ud800")


def test_each_value_replaced_by_nonsense(directory: ScoreDirectory) -> None:
    """One line that names the place, or what is read is what could have been written: of the right types, and everything else as it was."""
    file = write(directory, some(("on@0.5", 0, 0), ("on@0.5", 0, 1)))
    content, before = file.read_text(), directory.read()
    first, second = content.split("\n")[:-1]
    record = json.loads(second)
    places = [(key,) for key in record] + [(outer, key) for outer in ("adapter", "scores") for key in record[outer]]
    refused = 0
    for place in places:
        for value in (*NONSENSE, "absent", math.nan, math.inf):
            damaged = json.loads(second)
            inner = damaged
            for key in place[:-1]:
                inner = inner[key]
            if value == "absent":
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            file.write_text(first + "\n" + json.dumps(damaged) + "\n")
            try:
                found = directory.read()
            except UserError as error:
                assert str(error).startswith(f"{file}:2: ") and "\n" not in str(error), error
                refused += 1
                continue
            assert found.values.items() >= {Video("on@0.5", 0, 0): before.values[Video("on@0.5", 0, 0)]}.items()
            for video, scores in found.values.items():
                assert [type(part) for part in video] == [str, int, int] and min(video[1:]) >= 0
                assert "beauty" in scores and {type(score) for score in scores.values()} == {float}
            assert place[0] not in ("fingerprint", "text", "adapter") or value == 0.5 == record["adapter"][place[-1]], (place, value)
    assert refused > 0.8 * len(places) * (len(NONSENSE) + 3)


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


DAMAGED = [
    (content, "is damaged")
    for content in (
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"7",
        b'{"format": 1, "settings": []}',
        b'{"format": 1, "settings": [["seed", 7]]}',
        b'{"format": 1, "settings": "ab"}',
        b'{"format": 1, "settings": {"seed": NaN}}',
        b"[" * 100_000,
    )
]


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
    for content, said in ((b"{", "is damaged"), (b'{"format": 1}', "is damaged"), *DAMAGED, (b'{"format": 2, "settings": {}}', "format 2")):
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
