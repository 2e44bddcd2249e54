"""What the ranks of a job say: once on the terminal, the rest in a log each, and what ends one of them at once."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from support.commands import outcome
from support.ranks import run_commands

from arcopo_fast.errors import RankLost, UserError
from arcopo_fast.runtime.console import Progress
from arcopo_fast.runtime.rank_console import ERROR_FILE, log_to


def rank() -> int:
    return int(os.environ["RANK"])


def logs(folder: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in (folder / "logs").iterdir()}


def talkative(arguments: list[str]) -> None:
    print("before")
    warnings.warn("all ranks have it", stacklevel=1)
    log_to(Path(arguments[0]))
    if rank() == 2:
        warnings.warn("only rank 2 has it", stacklevel=1)
    with Progress(3, seconds=0) as progress:
        progress.update(0.5)
    print("after")


def test_rank_0_speaks_and_the_others_keep_a_log_each(tmp_path: Path) -> None:
    first, *others = run_commands(3, talkative, tmp_path)
    assert first.status == 0 and first.out == "before\nafter\n"
    assert len([line for line in first.lines if "UserWarning: all ranks have it" in line]) == 1 and any(
        line.startswith("1/3 ") for line in first.lines
    )
    assert others == [(0, [], ""), (0, [], "")]
    found = logs(tmp_path)
    assert set(found) == {"rank-1.log", "rank-2.log"}
    for number, lines in enumerate(found.values(), start=1):
        lines = found[f"rank-{number}.log"]
        assert f": rank {number} of 3, process " in lines[0] and lines[1] == "before" and lines[-1] == "after"
        assert any(line.startswith("1/3 ") for line in lines) and any("all ranks have it" in line for line in lines)
        assert any("only rank 2 has it" in line for line in lines) == (number == 2)


def test_a_later_start_adds_to_the_logs(tmp_path: Path) -> None:
    for _ in range(2):
        run_commands(2, talkative, tmp_path)
    lines = logs(tmp_path)["rank-1.log"]
    assert [line.partition(": ")[2][:13] for line in lines if "process" in line] == ["rank 1 of 2, "] * 2 and lines.count("after") == 2


def failing(arguments: list[str]) -> None:
    print("begun")
    if arguments[0] != "nowhere":
        log_to(Path(arguments[0]))
    if rank() == 1:
        raise UserError("the disk\nis full")
    if rank() == 2:
        raise AssertionError("surprise")
    raise RankLost("another rank has ended")


def test_what_ends_a_rank_is_heard_at_once_and_stands_in_its_log(tmp_path: Path) -> None:
    main, user, bug = run_commands(3, failing, tmp_path)
    assert main == (2, ["rank 0: error: another rank has ended"], "begun\n")
    assert user == (2, ["rank 1: error: the disk is full"], "")
    assert (bug.status, bug.out) == (1, "") and all(line.startswith("rank 2: ") for line in bug.lines)
    assert bug.lines[0] == "rank 2: Traceback (most recent call last):" and bug.lines[-1] == "rank 2: AssertionError: surprise"
    found = logs(tmp_path)
    assert found["rank-1.log"][1:] == ["begun", "error: the disk is full"]
    assert found["rank-2.log"][1] == "begun" and found["rank-2.log"][-1] == "AssertionError: surprise"


def test_what_a_rank_has_kept_is_said_with_a_bug_and_not_with_bad_input() -> None:
    _, user, bug = run_commands(3, failing, "nowhere")
    assert user.lines == ["rank 1: error: the disk is full"]
    assert bug.lines[0] == "rank 2: begun" and bug.lines[-1] == "rank 2: AssertionError: surprise"


def reporting(arguments: list[str]) -> None:
    os.environ[ERROR_FILE] = f"{arguments[0]}/{rank()}.json"
    failing(arguments)


def test_torchrun_reads_what_has_ended_a_rank_and_which_was_the_first(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    began = int(time.time())
    run_commands(2, reporting, tmp_path)
    lost, cause = (ProcessFailure(number, 1, 2, str(tmp_path / f"{number}.json")) for number in range(2))
    assert cause.message["message"] == "error: the disk is full"  # type: ignore[index]
    assert began <= cause.timestamp <= time.time() and cause.timestamp + 30 < lost.timestamp
    assert json.loads((tmp_path / "1.json").read_text())["message"]["message"] == "error: the disk is full"


def reporting_slowly(arguments: list[str]) -> None:
    def look(descriptor: int) -> None:
        """Tell whether torchrun would find a file, at each flush to the disk: the first is that of what it holds."""
        with Path(arguments[0], f"seen-{rank()}").open("a") as seen:
            seen.write(f"{Path(os.environ[ERROR_FILE]).exists()} ")

    os.fsync = look
    reporting(arguments)


def test_what_torchrun_reads_is_whole_or_absent(tmp_path: Path) -> None:
    run_commands(2, reporting_slowly, tmp_path)
    assert [(tmp_path / f"seen-{number}").read_text().split()[0] for number in range(2)] == ["False", "False"]
    assert all(json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))


def test_a_process_alone_has_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streams = sys.stdout, sys.stderr

    def main(arguments: list[str]) -> Any:
        assert (sys.stdout, sys.stderr) == streams
        log_to(tmp_path)
        print("alone")
        raise UserError("no")

    assert outcome(main, capsys) == (2, ["error: no"], "alone\n")
    assert not list(tmp_path.iterdir())


def test_half_a_launcher_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    status, lines, _ = outcome(lambda arguments: None, capsys)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: WORLD_SIZE is '', which is no number")
