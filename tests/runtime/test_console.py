"""The progress line, on a terminal and in a log file, and interruptions."""

from __future__ import annotations

import os
import re
import signal
import time
from io import StringIO

import pytest

from arcopo_fast.errors import RankLost, UserError
from arcopo_fast.runtime import console
from arcopo_fast.runtime.console import Interruption, Progress


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Progress, iterations: int = 5) -> None:
    with progress:
        for index in range(iterations):
            progress.update(index / 8, live=0.25)


def test_a_log_file_gets_plain_lines_now_and_then_and_at_the_end() -> None:
    stream = StringIO()
    run(Progress(5, stream=stream, seconds=1000))
    (line,) = stream.getvalue().splitlines()
    for part in ("5/5", "reward 0.500", "live 0.250", "s/it", "0:00 left"):
        assert part in line
    stream = StringIO()
    run(Progress(5, stream=stream, seconds=0))
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["1/5", "2/5", "3/5", "4/5", "5/5"]


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    stream = Terminal()
    run(Progress(5, stream=stream))
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.count("\r") > 1
    last = text.rsplit("\r", 1)[1]
    for part in ("100%", "5/5", "reward 0.500", "s/it"):
        assert part in last


def test_what_was_done_elsewhere_counts_as_done_and_not_for_the_pace() -> None:
    for stream in (StringIO(), Terminal()):
        with Progress(1000, stream=stream, seconds=0) as progress:
            time.sleep(0.1)
            progress.skip(998)
            progress.update(0.5)
            progress.update(0.5)
        last = stream.getvalue().rstrip().splitlines()[-1].rsplit("\r", 1)[-1]
        pace = re.search(r"([0-9.]+) s/it", last)
        assert "1000/1000" in last and pace and float(pace[1]) >= 0.05, last


def interrupted(error: Exception | None = None, sleep: float = 0) -> tuple[type[BaseException] | None, float]:
    """How a block ends in which a signal came, and after how many seconds."""
    began = time.monotonic()
    try:
        with Interruption("the iteration") as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.asked
            time.sleep(sleep)
            if error:
                raise error
    except BaseException as ended:
        return type(ended), time.monotonic() - began
    return None, time.monotonic() - began


def test_one_of_several_ranks_stops_before_its_launcher_kills_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.2)
    former = signal.getsignal(signal.SIGALRM)
    lost = RankLost("another rank has ended")
    assert interrupted(sleep=0.5)[0] is None and interrupted(lost)[0] is RankLost
    monkeypatch.setenv("WORLD_SIZE", "2")
    kind, seconds = interrupted(sleep=1)
    assert kind is KeyboardInterrupt and 0.1 < seconds < 0.9
    assert interrupted()[0] is interrupted(lost)[0] is KeyboardInterrupt and interrupted(UserError("no"))[0] is UserError
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == former
    assert capsys.readouterr().err.count("finishing the iteration first") == 6
