"""The commands of `make gpu`, run on a CPU that stands in for the device."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Timer
from time import monotonic
from typing import Any

import pytest

from benchmarks import commands, full_size, gpu, look, shapes, stand_in  # noqa: F401 - what is imported here, a fork need not

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shapes.DEVICE.type == "cuda", reason="there is a GPU, which a dry run does without")


class Forked:
    """Stands for `subprocess.Popen`: a module runs in a fork of this process, where its imports are done."""

    def __init__(self, command: Sequence[str], cwd: Path, env: Mapping[str, str], start_new_session: bool, **pipes: Any) -> None:
        assert command[:2] == [sys.executable, "-m"] and start_new_session
        end, begin = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.setsid()
                os.chdir(cwd)
                for stream in (1, 2):
                    os.dup2(begin, stream)
                sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
                os.environ.clear()
                os.environ.update(env)
                sys.argv = list(command[2:])
                runpy.run_module(command[2], run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as ended:
                status = int(ended.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(begin)
        self.stdout = os.fdopen(end, errors="replace")

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.stdout.close()
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode


def reports(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def check_reports(folder: Path) -> None:
    """Every step has written its file, nothing failed, and a machine that returns eight files of a run returns them all."""
    written = reports(folder)
    assert written.keys() == gpu.STEPS.keys() and len(list(folder.iterdir())) <= 8
    for name, report in written.items():
        assert report["status"] == gpu.PASSED and report["parts"] and report["environment"]["device"] == "CPU", name
    found = written["look"]
    assert {look.__name__ for look in look.LOOKS} <= found.keys()
    assert all("failed" not in found[look.__name__] and "not available" not in found[look.__name__] for look in look.LOOKS)
    assert found["backends"] and found["block"]["B=1"]["launches"] > 0 and found["synchronization"] == {"lines": {}}
    (row, *_) = found["attention"].values()
    assert row["auto"]["first"] > 0 and row["auto"]["flops_per_second"] > 0 and "on cpu" in row["cudnn"]["refused"]
    assert written["memcheck"]["parts"][0]["name"] == "a planted write out of bounds is found"


def test_every_step_of_the_schedule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the commands of one operator and of one part of an iteration: the others differ in an argument."""
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # a worker of pytest-xdist says so in its environment, and pytest-benchmark would listen
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(commands, "Popen", Forked)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    parts = ("engine-p4",)
    assert gpu.main(["--dry-run", "--jobs", "1", "--operator", "nft", "--part", *parts]) == 0, capfd.readouterr().out[-5000:]
    check_reports(tmp_path)
    written = reports(tmp_path)
    assert {part["name"] for part in written["iteration"]["parts"]} == {*parts} == written["iteration"]["measured"].keys()
    assert [case["operator"] for case in written["bench"]["cases"]] == ["nft_loss"] * len(written["bench"]["cases"]) != []
    assert written["memcheck"]["parts"][1]["found"] == 0 and (tmp_path / "iteration.md").exists()


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables = {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["make", "gpu-dry-run", f"GPU_PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    check_reports(tmp_path)


def test_the_schedule_fits_and_names_what_there_is() -> None:
    first = gpu.SCHEDULE[: next(index for index, stage in enumerate(gpu.SCHEDULE) if stage.seconds == gpu.SECONDS)]
    assert [stage.step for stage in first] == ["look", "tests", "memcheck", "iteration", "bench"]
    assert sum(stage.seconds for stage in first) <= 555 and gpu.WITHIN <= 540
    assert {stage.step for stage in gpu.SCHEDULE} == gpu.STEPS.keys() and gpu.SCHEDULE[-1].step == "sweep"
    assert {*gpu.MIDDLE_PARTS} <= {*full_size.PARTS}
    named = [name for stage in gpu.SCHEDULE if stage.step == "bench" for name in stage.choice["benchmarks"]]
    assert sorted(named) == sorted(gpu.BENCHMARKS), "each benchmark is run once"


def test_what_is_cut_short_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A command at work is killed, none is started after it, and the file says what there was."""
    stopped = Event()
    monkeypatch.setattr(commands, "_stopped", stopped)
    monkeypatch.setenv("OUT", str(tmp_path))

    def two(deadline: float, chosen: object) -> Any:
        for seconds in (0, 600, 600):
            done = commands.run([sys.executable, "-c", f"import time; time.sleep({seconds})"], deadline)
            yield done.part(f"{seconds} s, begun at {monotonic()}"), {}

    monkeypatch.setitem(gpu.STEPS, "tests", two)
    timer = Timer(1.0, commands.stop)
    timer.start()
    start = monotonic()
    assert gpu.run_step("tests", 600.0) == gpu.FAILED and monotonic() - start < 300
    statuses = [part["status"] for part in reports(tmp_path)["tests"]["parts"]]
    assert statuses == [gpu.PASSED, gpu.LATE, gpu.LATE] and not commands._at_work


def test_a_dry_run_does_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert gpu.main(["--dry-run"]) == 3 and "CUDA_VISIBLE_DEVICES" in capsys.readouterr().err
