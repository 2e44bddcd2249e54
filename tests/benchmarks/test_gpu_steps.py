"""The driver of `make gpu`, with commands and devices that are not there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier, Lock, Timer
from threading import enumerate as enumerate_threads
from time import monotonic
from typing import Any

import pytest
from arcopo_kernels.aot import OPERATORS

from benchmarks import commands, gpu, gpu_steps
from benchmarks.commands import ABSENT, FAILED, LATE, PASSED, Command, Outcome
from benchmarks.gpu_steps import ENGINE_TESTS

CLEAN = "========= ERROR SUMMARY: 0 errors"
FOUND = "========= ERROR SUMMARY: 3 errors"


def test_without_a_gpu_there_is_one_line_and_status_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["tests"]) == 3
    assert capsys.readouterr().err == "error: no GPU: torch.cuda.is_available() is False\n"


def test_a_command_is_killed_with_its_children_at_the_deadline() -> None:
    start = monotonic()
    child = "import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    outcome = commands.run([sys.executable, "-c", child], start + 2)
    assert outcome.status is None and monotonic() - start < 300
    assert outcome.part("part")["status"] == LATE
    assert commands.run(["never"], start).lines == ["not started"]


def test_a_command_that_nobody_reads_on_is_ended() -> None:
    others = {*enumerate_threads()}
    lines = iter(Command([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"], monotonic() + 300))
    process = int(next(lines))
    lines.close()  # as where an error ends the loop over it
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert all(thread.finished.is_set() for thread in {*enumerate_threads()} - others if isinstance(thread, Timer))


def test_a_kernel_that_does_not_launch_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], deadline: float, label: str = "", **variables: str) -> Outcome:
        broken = "--tool" not in command and command[-1] == "nft"
        return Outcome(int(broken), ["it broke"] if broken else [CLEAN], 0.0)

    monkeypatch.setattr(gpu_steps, "run", run)
    monkeypatch.setattr("shutil.which", lambda *_, **__: "compute-sanitizer")
    parts = {part["name"]: part for part, _ in gpu_steps.racecheck(0.0, gpu_steps.Chosen(benchmarks=("surrogate", "nft")))}
    assert parts["surrogate"]["status"] == PASSED
    assert parts["nft"]["status"] == FAILED and parts["nft"]["output"] == ["it broke"]


def test_tests_run_side_by_side_and_the_engines_with_all_operators_only(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most, ran, lock = 0, 0, set[str](), Lock()
    both = Barrier(2)

    def run(command: Sequence[str], deadline: float, label: str = "", **variables: str) -> Outcome:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
            ran.add(command[3])
        if len(ran) <= 2:
            both.wait(60)  # the second is there before the first has ended
        with lock:
            at_once -= 1
        return Outcome(0, [], 0.0)

    monkeypatch.setattr(gpu_steps, "run", run)
    parts = [part["name"] for part, _ in gpu_steps.tests(0.0, gpu_steps.Chosen(jobs=2))]
    assert set(parts) == ran > {*ENGINE_TESTS} and most == 2
    ran.clear()
    both.reset()
    with monkeypatch.context() as without:
        without.setattr(gpu_steps, "find_spec", lambda package: None if package == "pydantic" else package)
        absent = [part for part, _ in gpu_steps.tests(0.0, gpu_steps.Chosen(benchmarks=gpu_steps.BENCHMARKS[::-1], jobs=2))][
            : len(ENGINE_TESTS)
        ]
    assert [part["name"] for part in absent] == [*ENGINE_TESTS] and not ran & {*ENGINE_TESTS}
    assert all(part["status"] == ABSENT and part["output"] == ["not installed: pydantic"] for part in absent)
    ran.clear()
    both.reset()
    assert [part["name"] for part, _ in gpu_steps.tests(0.0, gpu_steps.Chosen(benchmarks=("nft", "surrogate"), jobs=2))]
    assert ran == {"tests/kernels/test_nft.py", "tests/kernels/test_surrogate.py"}


def test_every_gpu_test_is_in_a_file_that_the_step_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tests that this session has collected: where it is the whole suite, of all."""
    ran: list[str] = []
    monkeypatch.setattr(gpu_steps, "run", lambda command, *_, **__: ran.append(command[3]) or Outcome(0, [], 0.0))
    list(gpu_steps.tests(0.0, gpu_steps.Chosen(jobs=1)))
    assert "tests/kernels/test_swaps.py" in ran, "which has the mark from its fixture"
    marked = {str(item.path.relative_to(commands.REPOSITORY)) for item in request.session.items if item.get_closest_marker("gpu")}
    assert marked <= {*ran}


@pytest.mark.parametrize("step", ["tests", "bench"])
def test_what_hangs_leaves_time_for_the_others(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    given: list[float] = []
    monkeypatch.setattr(gpu_steps, "run", lambda command, deadline, *_, **__: given.append(deadline - monotonic()) or Outcome(0, [], 0.0))
    list(gpu.STEPS[step](monotonic() + 10 * gpu_steps.LONGEST, gpu_steps.Chosen(jobs=1)))
    assert len(given) > 7 and all(gpu_steps.LONGEST - 60 < seconds <= gpu_steps.LONGEST for seconds in given)
    given.clear()
    list(gpu.STEPS[step](monotonic() + 1.0, gpu_steps.Chosen(jobs=1)))
    assert max(given) <= 1


def test_an_error_of_the_driver_ends_its_step_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(deadline: float, chosen: gpu_steps.Chosen) -> gpu_steps.Parts:
        yield {"name": "first", "status": PASSED, "seconds": 0.0}, {}
        raise KeyError("seconds")

    monkeypatch.setitem(gpu.STEPS, "memcheck", breaks)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["memcheck", "racecheck"]) == 1
    first, itself = json.loads((tmp_path / "memcheck.json").read_text())["parts"]
    assert first["status"] == PASSED and itself["status"] == FAILED and itself["output"][-1] == "KeyError: 'seconds'"
    assert json.loads((tmp_path / "racecheck.json").read_text())["status"] == ABSENT


def test_all_steps_end_within_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, float]] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_step", lambda name, seconds, chosen: given.append((name, seconds)) or PASSED)
    assert gpu.main(["bench", "tests", "--within", "60"]) == 0
    assert [name for name, _ in given] == ["bench", "tests"] and all(0 < seconds <= 60 for _, seconds in given)
    given.clear()
    assert gpu.main(["tests"]) == 0 and given == [("tests", gpu.SECONDS)]


def test_a_command_sees_both_packages_and_its_status_counts() -> None:
    outcome = commands.run([sys.executable, "-c", "import sys; print(sys.path[1:3]); sys.exit(4)"], monotonic() + 300)
    assert outcome.status == 4 and "kernels" in outcome.lines[0]
    assert outcome.part("part") | {"seconds": 0} == {
        "name": "part",
        "status": FAILED,
        "seconds": 0,
        "exit": 4,
        "output": outcome.lines,
    }


class Commands:
    """Stands for `gpu_steps.run`: what each command would have printed, and its status."""

    def __init__(self, planted: tuple[int, str] = (gpu_steps.SANITIZER_FOUND, FOUND), watched: tuple[int, str] = (0, CLEAN)) -> None:
        self.planted = planted
        self.watched = watched

    def __call__(self, command: Sequence[str], deadline: float, label: str = "", **variables: str) -> Outcome:
        if "--tool" not in command:
            return Outcome(0, [], 0.0)
        assert variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status, line = self.planted if "--plant" in command else self.watched
        return Outcome(status, [line], 0.0)


@pytest.mark.parametrize(
    ("commands", "statuses"),
    [
        (Commands(), [PASSED] * (1 + len(OPERATORS))),
        (Commands(watched=(gpu_steps.SANITIZER_FOUND, FOUND)), [PASSED] + [FAILED] * len(OPERATORS)),
        (Commands(watched=(0, FOUND)), [PASSED] + [FAILED] * len(OPERATORS)),
        (Commands(watched=(0, "no summary")), [PASSED] + [FAILED] * len(OPERATORS)),
        (Commands(planted=(0, CLEAN)), [FAILED]),
        (Commands(planted=(1, "========= Error: Device not supported")), [ABSENT]),
    ],
)
def test_the_sanitizer_is_believed_only_if_it_sees_a_planted_error(
    monkeypatch: pytest.MonkeyPatch, commands: Commands, statuses: list[str]
) -> None:
    monkeypatch.setattr(gpu_steps, "run", commands)
    monkeypatch.setattr("shutil.which", lambda *_, **__: "compute-sanitizer")
    assert [part["status"] for part, _ in gpu_steps.memcheck(0.0, gpu_steps.Chosen())] == statuses


def test_a_sanitizer_that_is_not_there_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    ((part, _),) = gpu_steps.racecheck(0.0, gpu_steps.Chosen())
    assert part["status"] == ABSENT


def test_a_step_writes_what_its_parts_measured_and_its_worst_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def bench(command: Sequence[str], deadline: float, label: str = "", **variables: str) -> Outcome:
        name = Path(command[3]).stem
        if name == "bench_nft":
            return Outcome(1, ["it broke"], 0.1)
        case = {"operator": name, "mode": "forward", "case": "N=1", "failed": "for the test"}
        content = {"environment": {}, "ceilings": {"bandwidth": 1.0, "matmul": 1.0}, "cases": [case]}
        Path(variables["OUT"], "part.json").write_text(json.dumps(content))
        return Outcome(0, [], 0.1)

    monkeypatch.setattr(gpu_steps, "run", bench)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.run_step("bench", 60.0) == FAILED
    report: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert report["status"] == FAILED and len(report["parts"]) == len(gpu_steps.BENCHMARKS) == len(report["cases"]) + 1
    (bad,) = (part for part in report["parts"] if part["status"] != PASSED)
    assert bad["name"] == "nft" and bad["output"] == ["it broke"]


def test_counts_of_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="wrong"/></testcase>'
        '<testcase name="c"><skipped/></testcase><testcase name="d"><error message="broken"/></testcase></testsuite></testsuites>'
    )
    assert gpu_steps._counts(report) == {"passed": 1, "failed": 2, "skipped": 1, "failures": {"b": "wrong", "d": "broken"}}
    assert gpu_steps._counts(tmp_path / "none.xml") == {}
    report.write_text(report.read_text()[:100])
    assert gpu_steps._counts(report) == {}, "of a process that was killed"


def test_the_worst_status_of_the_parts_stands_for_all() -> None:
    assert gpu.worst([PASSED, ABSENT, LATE]) == LATE
    assert gpu.worst([PASSED]) == PASSED
    assert gpu.worst([]) == FAILED, "a step without parts has shown nothing"
