"""Processes that share a replay buffer make each entry once, whoever is killed."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.buffers import POLICY, RECIPE, names

from arcopo_fast.data.buffer import Buffer


def test_a_forked_child_that_stays_does_not_keep_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inherited, opened = [], os.open

    def forking(*arguments: Any) -> int:
        descriptor = opened(*arguments)
        inherited.append(os.dup(descriptor))  # what a child would hold
        return descriptor

    buffer = Buffer.create(tmp_path, POLICY, RECIPE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", forking)
        assert next(buffer.missing(1)) == 0

    def waiting(others: list[int]) -> None:
        raise AssertionError(f"entries {others} are still claimed")

    try:
        assert inherited and next(buffer.missing(1, waiting)) == 0
    finally:
        for descriptor in inherited:
            os.close(descriptor)


# Processes -------------------------------------------------------------------------------------------------------------------------

# Importing torch takes seconds, so one process imports it and forks the workers, before it has opened or computed anything.
FORKS = """
import os, random, sys, time, traceback
import torch
from arcopo_fast.data.buffer import Buffer
from arcopo_fast.errors import UserError
from arcopo_fast.storage.identity import values_digest

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # one call: lines of several processes do not mix

def fork(work, *arguments):
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def wait(children):
    return [os.waitpid(child, 0)[1] for child in children]
"""


FILL = """
folder, workers, groups, races = sys.argv[1], *map(int, sys.argv[2:])

def work(worker, start):
    chance = random.Random(worker)
    for race in range(races):
        while time.time() < start + race / 50:
            pass
        try:
            Buffer.create(f"{folder}/race-{race}", {"worker": worker}, {})
            say("won", race)
        except UserError as error:
            assert "another policy" in str(error), error
    buffer = Buffer.create(f"{folder}/buffer", {}, {})
    for index in buffer.missing(groups):
        say("made", index, worker)
        open(f"{folder}/here-{worker}", "w").close()
        while not all(os.path.exists(f"{folder}/here-{other}") for other in range(workers)):  # all hold a claim at one moment
            time.sleep(0.001)
        time.sleep(0.02 * chance.random())
        buffer.write(index, {"x": torch.full((5, 3), float(index))}, {"worker": worker})
    assert buffer.indices == list(range(groups)), buffer.indices  # nobody ends before all is there

start = time.time() + 0.1
assert not any(wait([fork(work, worker, start) for worker in range(workers)]))
"""


HANG = """
def hang(*words):
    parent, end = os.getppid(), time.time() + 600
    say(*words, os.getpid())
    while os.getppid() == parent and time.time() < end:
        time.sleep(0.1)
    os._exit(1)

def work(stage):
    buffer, fsync, calls = Buffer.create(f"{sys.argv[1]}/{stage}", {}, {}), os.fsync, []

    def hanging(descriptor):  # of the file before it gets its name, then of the directory
        calls.append(descriptor)
        if len(calls) == {"writing": 1, "named": 2}[stage]:
            hang(stage)
        fsync(descriptor)

    for index in buffer.missing(4):
        if index == 1:
            if stage == "making":
                hang(stage)
            os.fsync = hanging
        buffer.write(index, {"x": torch.full((5, 3), float(index))}, {"by": "first"})
    say("finished", stage)

wait([fork(work, stage) for stage in ("making", "writing", "named")])
"""


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FORKS + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_three_processes_fill_one_buffer(tmp_path: Path) -> None:
    groups, races = 40, 15
    with python(FILL, tmp_path, 3, groups, races) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    made = {int(index): int(worker) for index, worker in re.findall(r"made (\d+) (\d)", said)}
    assert sorted(map(int, re.findall(r"made (\d+)", said))) == list(range(groups))  # each once
    assert set(made.values()) == {0, 1, 2}
    assert sorted(map(int, re.findall(r"won (\d+)", said))) == list(range(races))
    entries = list(Buffer.open(tmp_path / "buffer", {}).entries())
    assert {entry.index: entry.metadata["worker"] for entry in entries} == made
    assert all((entry.tensors["x"] == entry.index).all() for entry in entries)
    assert names(tmp_path / "buffer") == [f"{index:06d}.safetensors" for index in range(groups)]


def test_what_a_killed_process_left_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes hang with entry 1 claimed, at different stages. Another goes on, waits for them and is freed by their death."""
    asked, flock = [], fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: (asked.append(operation), flock(descriptor, operation)))
    with python(HANG, tmp_path) as process:
        assert process.stdout
        hanging = dict(process.stdout.readline().split() for _ in range(3))
        try:
            assert hanging.keys() == {"making", "writing", "named"}
            for stage, pid in hanging.items():
                path = tmp_path / stage
                buffer, made, killed = Buffer.create(path, {}, {}), [], threading.Event()

                def kill(pid: str = pid, killed: threading.Event = killed) -> None:
                    killed.set()
                    os.kill(int(pid), signal.SIGKILL)

                def waiting(others: list[int], stage: str = stage, path: Path = path, kill: Any = kill) -> None:
                    assert others == [1]
                    assert Buffer.open(path, {}).indices == ([0, 1, 2, 3] if stage == "named" else [0, 2, 3])
                    assert len([name for name in names(path) if name.startswith(".")]) == (stage == "writing")
                    threading.Timer(0.2, kill).start()

                asked.clear()
                for index in buffer.missing(4, waiting):
                    assert killed.is_set() == (index == 1)
                    made.append(index)
                    buffer.write(index, {"x": torch.full((5, 3), float(index))}, {"by": "second"})
                assert killed.is_set() and made == ([2, 3] if stage == "named" else [2, 3, 1])
                assert asked.count(fcntl.LOCK_EX | fcntl.LOCK_NB) == 4 and asked.count(fcntl.LOCK_EX) == 1  # it slept, and did not poll
                assert names(path) == [f"{index:06d}.safetensors" for index in range(4)]
                for entry in Buffer.open(path, {}).entries():
                    assert entry.metadata == {"by": "second" if entry.index in made else "first"}
                    assert (entry.tensors["x"] == entry.index).all()
        finally:
            process.terminate()  # its children see that and end
