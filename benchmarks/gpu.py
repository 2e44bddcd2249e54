"""Everything that needs a GPU, in steps that each end within ten minutes.

    python -m benchmarks.gpu [STEP ...] [--operator NAME ...] [--part NAME ...]      all steps, or some; of all operators and parts, or some

    tests        the GPU tests of the kernels, pytest -m gpu tests/kernels, one process for each file
    memcheck     compute-sanitizer's search for bad memory accesses, over `every_kernel`, one process for each operator
    racecheck    the same for hazards in shared memory
    bench        the benchmarks, one process for each operator
    sweep        the benchmarks of other block sizes than the heuristics'
    iteration    a whole iteration at full size: the engine's GPU tests, then the parts of `iteration.PARTS`, one process for each

Each step writes STEP.json to $OUT when that is set, else to benchmarks/results/<device>/, anew after each of its parts. Exit status 1 if
something failed or did not end in time, 3 if nothing did, but a step could not run here (no GPU, no compute-sanitizer) and so says nothing.

`iteration` takes longer than ten minutes: run it again until it has passed. What it measured is kept, and not measured again while sources
and settings are the same; a part by its name is `--part engine-p1`. Beside its JSON it writes the same as tables, iteration.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from arcopo_kernels.aot import OPERATORS

from benchmarks import iteration as full_size
from benchmarks import results, shapes

REPOSITORY = results.ROOT.parent
SECONDS = 570.0
"""That a step may take: ten minutes, less what a start and a last file take."""
PASSED, FAILED, LATE, ABSENT = "passed", "failed", "out of time", "not available"
SANITIZER_FOUND = 86
"""Exit status of compute-sanitizer when it has found something; the program's own statuses are smaller."""
KEPT_LINES = 60
"""Of a part's output, in the step's file, when the part does not pass."""

Part = dict[str, Any]
Parts = Iterator[tuple[Part, Mapping[str, Any]]]
"""What a step yields: each of its parts, with what it measured, an object as the benchmarks write it, or nothing."""


class Outcome(NamedTuple):
    """How a command ended: its exit status, None if it was killed at its deadline, and the end of its output."""

    status: int | None
    lines: list[str]
    seconds: float

    def part(self, name: str, verdict: str | None = None, **more: Any) -> Part:
        """What the step's file says of it."""
        verdict = LATE if self.status is None else verdict or (FAILED if self.status else PASSED)
        end = {} if verdict == PASSED else {"exit": self.status, "output": self.lines[-KEPT_LINES:]}
        return {"name": name, "status": verdict, "seconds": round(self.seconds, 1), **more, **end}


def run(command: Sequence[str], deadline: float, **variables: str) -> Outcome:
    """Run a command from the root of the repository, printing what it prints; it and its children are killed at the deadline."""
    start = monotonic()
    if start >= deadline:
        return Outcome(None, ["not started"], 0.0)
    path = os.pathsep.join(filter(None, ["kernels", ".", os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes)
    late: list[bool] = []

    def kill() -> None:
        late.append(True)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = Timer(deadline - start, kill)
    timer.start()
    lines: deque[str] = deque(maxlen=2000)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = process.wait()
    timer.cancel()
    return Outcome(None if late else status, list(lines), monotonic() - start)


def tests(deadline: float, operators: Sequence[str]) -> Parts:
    for path in sorted((REPOSITORY / "tests" / "kernels").glob("test_*.py")):
        if operators != OPERATORS and not any(operator in path.stem for operator in operators):
            continue
        if "gpu" not in path.read_text(encoding="utf-8"):  # nor need what such a file imports be there
            continue
        name = str(path.relative_to(REPOSITORY))
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = [sys.executable, "-m", "pytest", name, "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            outcome = run(command, deadline)
            counts = _counts(report)
        # pytest's status 5: the file has no such test.
        yield outcome.part(name, PASSED if outcome.status == 5 else None, **counts), {}


def _counts(report: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and which failed with what message, from pytest's XML."""
    if not report.exists():
        return {}
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}
    for test in ElementTree.parse(report).iter("testcase"):
        bad = next((child for child in test if child.tag in ("failure", "error")), None)
        counts["skipped" if test.find("skipped") is not None else "passed" if bad is None else "failed"] += 1
        if bad is not None:
            counts["failures"][test.get("name", "")] = bad.get("message", "")[:500]
    return counts


def memcheck(deadline: float, operators: Sequence[str]) -> Parts:
    yield from _sanitizer("memcheck", deadline, operators)


def racecheck(deadline: float, operators: Sequence[str]) -> Parts:
    yield from _sanitizer("racecheck", deadline, operators)


def _sanitizer(tool: str, deadline: float, operators: Sequence[str]) -> Parts:
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)
    if path is None:
        yield {"name": "compute-sanitizer", "status": ABSENT, "output": [f"neither on the PATH nor in {toolkit}"]}, {}
        return
    program = [sys.executable, "-m", "benchmarks.every_kernel"]
    outcome = run([*program, "--operator", *operators], deadline)
    yield outcome.part("every kernel is launched, unwatched"), {}  # and compiled: under the sanitizer that would take longer
    if outcome.status != 0:
        return

    def watch(name: str, *arguments: str, planted: bool = False) -> Part:
        # One allocation for each tensor: in the caching allocator's blocks an access beyond the end of one would meet another.
        command = [path, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), *program, *arguments]
        outcome = run(command, deadline, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = [int(number) for number in re.findall(r"SUMMARY: (\d+)", "\n".join(outcome.lines))]
        if any("Device not supported" in line for line in outcome.lines):
            return outcome.part(name, ABSENT)
        if planted:
            return outcome.part(name, PASSED if sum(found) else FAILED)
        return outcome.part(name, PASSED if outcome.status == 0 and found and not sum(found) else FAILED, found=sum(found))

    if tool == "memcheck":
        control = watch("a planted write out of bounds is found", "--plant", planted=True)
        yield control, {}
        if control["status"] != PASSED:
            return
    for operator in operators:
        yield watch(operator, "--operator", operator), {}


def bench(deadline: float, operators: Sequence[str]) -> Parts:
    yield from _benchmarks(deadline, operators)


def sweep(deadline: float, operators: Sequence[str]) -> Parts:
    yield from _benchmarks(deadline, operators, "--sweep", "--seconds", "0.2")


def _benchmarks(deadline: float, operators: Sequence[str], *options: str) -> Parts:
    for operator in operators:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{operator}.py", "-q", "-p", "no:cacheprovider"]
            outcome = run([*command, "--benchmark-only", "--results", "part", *options], deadline, OUT=folder)
            report = Path(folder, "part.json")
            measured = json.loads(report.read_text()) if report.exists() else {}
        yield outcome.part(operator), measured


ENGINE_TESTS = "tests/rollout/test_gpu_engine.py"


def iteration(deadline: float, parts: Sequence[str]) -> Parts:
    """What it yields as measured is everything so far: of this run, and of earlier ones with the same sources and settings."""
    fingerprint = full_size.fingerprint()
    measured = _earlier(fingerprint)
    command = [sys.executable, "-m", "pytest", ENGINE_TESTS, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    yield run(command, deadline).part(ENGINE_TESTS), _full_size_report(measured, fingerprint)
    for name in full_size.PARTS:
        if name in measured:
            part = {"name": name, "status": PASSED, "seconds": 0.0, "measured": measured[name]["environment"]["date"]}
        elif name in parts:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "part.json")
                part = run([sys.executable, "-m", "benchmarks.iteration", name, "--write", str(file)], deadline).part(name)
                if part["status"] == PASSED:
                    measured[name] = json.loads(file.read_text())
        else:
            continue
        yield part, _full_size_report(measured, fingerprint)


def _earlier(fingerprint: str) -> dict[str, Any]:
    """What earlier runs on such a device measured of the same sources and settings, by part; what lies in $OUT goes first."""
    measured: dict[str, Any] = {}
    for path in (*results.ROOT.glob("results/*/iteration.json"), results.folder(shapes.DEVICE) / "iteration.json"):
        with suppress(OSError, ValueError, KeyError):
            report = json.loads(path.read_text())
            if report["fingerprint"] == fingerprint and report["environment"]["device"] == results.device_name(shapes.DEVICE):
                measured |= report["measured"]
    return measured


def _full_size_report(measured: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """The fields of the step's file, and its tables in iteration.md."""
    if not measured:
        return {}
    ordered = [measured[name] for name in full_size.PARTS if name in measured]
    fields = {"fingerprint": fingerprint, "measured": dict(measured), "ceilings": ordered[0]["ceilings"]}
    fields["cases"] = full_size.merged([case for part in ordered for case in part["cases"]])
    if fields["cases"]:
        text = full_size.markdown({"environment": ordered[0]["environment"], **fields})
        (results.folder(shapes.DEVICE) / "iteration.md").write_text(text)
    return fields


STEPS = {step.__name__: step for step in (tests, memcheck, racecheck, bench, sweep, iteration)}


def run_step(name: str, seconds: float, what: Sequence[str] = OPERATORS) -> str:
    """Run one step, of these operators (or parts), write its file, and give its status: the worst of its parts."""
    start = monotonic()
    environment = results.environment(shapes.DEVICE)
    path = results.folder(shapes.DEVICE) / f"{name}.json"
    report: dict[str, Any] = {"step": name, "status": FAILED, "environment": environment, "parts": []}
    for part, measured in STEPS[name](start + seconds, what):
        report["parts"].append(part)
        if name == "iteration":
            report |= measured
        elif measured:
            report["ceilings"] = measured["ceilings"]  # those of the last part stand for all: the device is one
            report.setdefault("cases", []).extend(measured["cases"])
        report["seconds"] = round(monotonic() - start, 1)
        results.write(path, report)
    report["status"] = _worst([part["status"] for part in report["parts"]])
    if name == "tests" and not sum(part.get("passed", 0) for part in report["parts"]):
        report["status"] = FAILED  # that no test ran proves nothing
    results.write(path, report)
    print(f"\n{name}: {report['status']} in {monotonic() - start:.0f} s, written to {path}")
    for part in report["parts"]:
        counts = ", ".join(f"{part[key]} {key}" for key in ("passed", "failed", "skipped", "found") if key in part)
        print(f"  {part['name']:44s} {part['status']:14s} {counts}".rstrip())
    if report.get("cases"):
        print(full_size.markdown(report) if name == "iteration" else "\n".join(results.table(report)), flush=True)
    return str(report["status"])


def _worst(statuses: Sequence[str]) -> str:
    return next((status for status in (FAILED, LATE, ABSENT) if status in statuses), PASSED if statuses else FAILED)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that each step may take (default: %(default)s)")
    parser.add_argument("--operator", nargs="+", default=OPERATORS, choices=OPERATORS)
    parser.add_argument("--part", nargs="+", default=full_size.PARTS, choices=full_size.PARTS, help="of the full-size iteration")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.steps) - STEPS.keys():
        parser.error(f"unknown step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        print("error: no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 3
    what = dict.fromkeys(STEPS, arguments.operator) | {"iteration": arguments.part}
    statuses = {name: run_step(name, arguments.seconds, what[name]) for name in arguments.steps or STEPS}
    print("\n" + ", ".join(f"{name} {status}" for name, status in statuses.items()))
    return {PASSED: 0, ABSENT: 3}.get(_worst(list(statuses.values())), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
