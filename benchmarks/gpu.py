"""Everything that needs a GPU, in steps that each end within ten minutes.

    python -m benchmarks.gpu [STEP ...] [--within SECONDS] [--operator NAME ...] [--part NAME ...]

    tests        the GPU tests of the kernels and the engine, pytest -m gpu, one process for each file
    memcheck     compute-sanitizer's search for bad memory accesses, over `every_kernel`, one process for each operator
    racecheck    the same for hazards in shared memory
    bench        the benchmarks, one process for each operator, and one for layers of an iteration
    sweep        the benchmarks of other block sizes than the heuristics'
    iteration    a whole iteration at full size, the parts of `full_size.PARTS`, in one process

All steps, or some, in the order given; of all operators and parts, or some. --within: all of them together, for a machine that is lent by
the minute. Processes of the first three steps run side by side, --jobs of them: mostly they compile.

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
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from arcopo_kernels.aot import OPERATORS

from benchmarks import results, shapes

REPOSITORY = results.ROOT.parent
SECONDS = 570.0
"""Seconds that a step may take: ten minutes, less what a start and a last file take."""
PASSED, FAILED, LATE, ABSENT = "passed", "failed", "out of time", "not available"
SANITIZER_FOUND = 86
"""Exit status of compute-sanitizer when it has found something; the program's own statuses are smaller."""
KEPT_LINES = 60
"""Lines of a part's output, in the step's file, when the part does not pass."""
ENGINE_TESTS = ("tests/rollout/test_gpu_engine.py", "tests/rollout/test_graphs.py", "tests/rewards/test_clip.py")
"""Beside those of the kernels: every other file that has GPU tests."""
ENGINE_NEEDS = ("peft", "pydantic", "safetensors", "transformers")
"""Beside what the kernels need."""
KERNEL_TESTS_ON_A_CPU = ("test_paging_properties.py",)
"""Has no GPU test, and needs hypothesis."""
LONGEST = 180.0
"""Seconds that the tests of one file, or the benchmark of one operator, may take: one that hangs leaves time for the others."""
JOBS = max(1, min(8, (os.cpu_count() or 2) // 2))
"""Processes that run side by side where nothing is timed: a GPU has room for some small tests at once."""
BENCHMARKS = ("layers", "attention", *(operator for operator in OPERATORS if operator != "attention"))
"""The operators; those in which an iteration spends most of its time come first."""


class Chosen(NamedTuple):
    """The steps that are wanted.

    benchmarks: of all steps but `iteration`. parts: of that; none: all. jobs: see `JOBS`. rounds: how often an iteration is timed.
    compiled: whether `bench` measures torch.compile too, as its option --compiled says it.
    """

    benchmarks: Sequence[str] = BENCHMARKS
    parts: Sequence[str] = ()
    jobs: int = JOBS
    rounds: int = 2
    compiled: str = "auto"

    @property
    def operators(self) -> list[str]:
        """Those with kernels of their own."""
        return [name for name in self.benchmarks if name in OPERATORS]


Part = dict[str, Any]
Parts = Iterator[tuple[Part, Mapping[str, Any]]]
"""The yield of a step: each of its parts, with what it measured, an object as the benchmarks write it, or nothing."""


class Outcome(NamedTuple):
    """The end of a command: its exit status, None if it was killed at its deadline, and the end of its output."""

    status: int | None
    lines: list[str]
    seconds: float

    def part(self, name: str, verdict: str | None = None, **more: Any) -> Part:
        """Return what the step's file says of it."""
        verdict = LATE if self.status is None else verdict or (FAILED if self.status else PASSED)
        end = {} if verdict == PASSED else {"exit": self.status, "output": self.lines[-KEPT_LINES:]}
        return {"name": name, "status": verdict, "seconds": round(self.seconds, 1), **more, **end}


class Command:
    """A command at work, from the root of the repository: iterating gives the lines that it prints, which are printed, `label` before each.

    It and its children are killed at the deadline. `outcome` is there once all lines are.
    """

    outcome: Outcome

    def __init__(self, command: Sequence[str], deadline: float, label: str = "", **variables: str) -> None:
        self.command, self.deadline, self.label, self.variables = command, deadline, label, variables

    def __iter__(self) -> Iterator[str]:
        start = monotonic()
        if start >= self.deadline:
            self.outcome = Outcome(None, ["not started"], 0.0)
            return
        path = os.pathsep.join(filter(None, ["kernels", ".", os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **self.variables}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen(self.command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes)
        late: list[bool] = []

        def kill() -> None:
            late.append(True)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = Timer(self.deadline - start, kill)
        timer.start()
        lines: deque[str] = deque(maxlen=2000)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(self.label + line, end="", flush=True)
                lines.append(line.rstrip())
                yield lines[-1]
            status = process.wait()
        finally:  # whoever reads may have had enough: nothing may go on beside what is timed next
            timer.cancel()
            if process.poll() is None:
                kill()
                process.wait()
        self.outcome = Outcome(None if late else status, list(lines), monotonic() - start)


def run(command: Sequence[str], deadline: float, label: str = "", **variables: str) -> Outcome:
    """Run a `Command` to its end."""
    running = Command(command, deadline, label, **variables)
    for _ in running:
        pass
    return running.outcome


def side_by_side(calls: Sequence[Callable[[], Part]], jobs: int) -> Iterator[Part]:
    """Yield what the calls return, as they end."""
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(call) for call in calls]):
            yield future.result()


def tests(deadline: float, chosen: Chosen) -> Parts:
    paths = sorted((REPOSITORY / "tests" / "kernels").glob("test_*.py"))
    names = [str(path.relative_to(REPOSITORY)) for path in paths if path.name not in KERNEL_TESTS_ON_A_CPU]
    if {*chosen.operators} == {*OPERATORS}:
        if missing := [package for package in ENGINE_NEEDS if find_spec(package) is None]:
            for name in ENGINE_TESTS:
                yield _absent(name, f"not installed: {', '.join(missing)}"), {}
        else:
            names = [*ENGINE_TESTS, *names]  # they take longest
    else:
        names = [name for name in names if any(operator in Path(name).stem for operator in chosen.operators)]

    def test(name: str) -> Part:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = [sys.executable, "-m", "pytest", name, "-m", "gpu", "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
            outcome = run(command, min(deadline, monotonic() + LONGEST), f"[{Path(name).stem}] ")
            counts = _counts(report)
        # pytest's status 5: the file has no such test.
        return outcome.part(name, PASSED if outcome.status == 5 else None, **counts)

    for part in side_by_side([partial(test, name) for name in names], chosen.jobs):
        yield part, {}


def _absent(name: str, why: str) -> Part:
    return {"name": name, "status": ABSENT, "seconds": 0.0, "output": [why]}


def _counts(report: Path) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped, and which failed with what message, from pytest's XML."""
    if not report.exists():
        return {}
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}
    try:
        tree = ElementTree.parse(report)
    except ElementTree.ParseError:  # pytest was killed while it wrote
        return {}
    for test in tree.iter("testcase"):
        bad = next((child for child in test if child.tag in ("failure", "error")), None)
        counts["skipped" if test.find("skipped") is not None else "passed" if bad is None else "failed"] += 1
        if bad is not None:
            counts["failures"][test.get("name", "")] = bad.get("message", "")[:500]
    return counts


def memcheck(deadline: float, chosen: Chosen) -> Parts:
    yield from _sanitizer("memcheck", deadline, chosen)


def racecheck(deadline: float, chosen: Chosen) -> Parts:
    yield from _sanitizer("racecheck", deadline, chosen)


def _sanitizer(tool: str, deadline: float, chosen: Chosen) -> Parts:
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)
    if path is None:
        yield _absent("compute-sanitizer", f"neither on the PATH nor in {toolkit}"), {}
        return
    program = [sys.executable, "-m", "benchmarks.every_kernel"]

    def watch(name: str, *arguments: str, planted: bool = False) -> Part:
        # One allocation for each tensor: in the caching allocator's blocks an access beyond the end of one would meet another.
        command = [path, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), *program, *arguments]
        outcome = run(command, deadline, f"[{name}] ", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = [int(number) for number in re.findall(r"SUMMARY: (\d+)", "\n".join(outcome.lines))]
        if any("Device not supported" in line for line in outcome.lines):
            return outcome.part(name, ABSENT)
        if planted:
            return outcome.part(name, PASSED if sum(found) else FAILED)
        return outcome.part(name, PASSED if outcome.status == 0 and found and not sum(found) else FAILED, found=sum(found))

    def launch_then_watch(operator: str) -> Part:
        outcome = run([*program, "--operator", operator], deadline, f"[{operator}] ")  # compiles: under the sanitizer that takes longer
        return watch(operator, "--operator", operator) if outcome.status == 0 else outcome.part(operator)

    if tool == "memcheck":
        control = watch("a planted write out of bounds is found", "--plant", planted=True)
        yield control, {}
        if control["status"] != PASSED:
            return
    for part in side_by_side([partial(launch_then_watch, operator) for operator in chosen.operators], chosen.jobs):
        yield part, {}


def bench(deadline: float, chosen: Chosen) -> Parts:
    yield from _benchmarks(deadline, chosen.benchmarks, "--compiled", chosen.compiled)


def sweep(deadline: float, chosen: Chosen) -> Parts:
    yield from _benchmarks(deadline, chosen.operators, "--sweep", "--seconds", "0.2")


def _benchmarks(deadline: float, operators: Sequence[str], *options: str) -> Parts:
    for operator in operators:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{operator}.py", "-q", "-p", "no:cacheprovider"]
            arguments = ["--benchmark-only", "--results", "part", *options]
            outcome = run([*command, *arguments], min(deadline, monotonic() + LONGEST), OUT=folder)
            report = Path(folder, "part.json")
            measured = json.loads(report.read_text()) if report.exists() else {}
        # pytest's status 5: the file was skipped whole, for want of something.
        yield outcome.part(operator, ABSENT if outcome.status == 5 else None), measured


def iteration(deadline: float, chosen: Chosen) -> Parts:
    """Yield everything that was measured so far: of this run, and of earlier ones with the same sources and settings."""
    try:
        from benchmarks import full_size  # the other steps need less
    except ModuleNotFoundError as error:
        yield _absent("benchmarks.full_size", str(error)), {}
        return
    fingerprint = full_size.fingerprint()
    wanted, measured = chosen.parts or full_size.PARTS, _earlier(fingerprint)
    for name in chosen.parts:
        if measured.get(name, {}).get("problems"):
            del measured[name]  # asked for by its name, it is measured anew
    for name in wanted:
        if name in measured:
            part = {"name": name, "seconds": 0.0, "measured": measured[name]["environment"]["date"]}
            yield part | _verdict(measured[name].get("problems", [])), _full_size_report(measured, fingerprint)
    left = [name for name in wanted if name not in measured]
    while left:
        progress, at_work = len(left), ""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "parts.json")
            options = ["--write", str(file), "--rounds", str(chosen.rounds)]
            command = Command([sys.executable, "-m", "benchmarks.full_size", *left, *options], deadline)
            begun, lines = monotonic(), list[str]()
            for line in command:
                lines.append(line)
                said = full_size.SAID.fullmatch(line)
                if said is None:
                    continue
                if said["verdict"] == "begun":
                    begun, lines, at_work = monotonic(), [line], said["part"]
                    continue
                name, failed, at_work = said["part"], said["verdict"] == "failed", ""
                part = {"name": name, "seconds": round(monotonic() - begun, 1), **_verdict(lines if failed else [])}
                lines = []
                left.remove(name)
                if file.exists():
                    measured |= json.loads(file.read_text())
                yield part, _full_size_report(measured, fingerprint)
        ended = command.outcome
        if ended.status is not None and at_work:  # it died in this part
            left.remove(at_work)
            yield ended.part(at_work, FAILED) | {"seconds": round(monotonic() - begun, 1)}, _full_size_report(measured, fingerprint)
        if ended.status is not None and len(left) < progress:  # the rest in a new process
            continue
        for index, name in enumerate(left):
            part = ended.part(name, FAILED)
            if index:
                part = {"name": name, "status": part["status"], "seconds": 0.0, "output": ["not started"]}
            yield part, _full_size_report(measured, fingerprint)
        return


def _verdict(problems: Sequence[str]) -> Part:
    return {"status": FAILED, "output": problems[-KEPT_LINES:]} if problems else {"status": PASSED}


def _earlier(fingerprint: str) -> dict[str, Any]:
    """Return what earlier runs on such a device measured of the same sources and settings, by part; what lies in $OUT goes first."""
    measured: dict[str, Any] = {}
    for path in (*results.ROOT.glob("results/*/iteration.json"), results.folder(shapes.DEVICE) / "iteration.json"):
        with suppress(OSError, ValueError, KeyError):
            report = json.loads(path.read_text())
            if report["fingerprint"] == fingerprint and report["environment"]["device"] == results.device_name(shapes.DEVICE):
                measured |= report["measured"]
    return measured


def _full_size_report(measured: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """The fields of the step's file, and its tables in iteration.md."""
    from benchmarks import full_size, tables

    if not measured:
        return {}
    ordered = [measured[name] for name in full_size.PARTS if name in measured]
    fields = {"fingerprint": fingerprint, "measured": dict(measured), "ceilings": ordered[0]["ceilings"]}
    fields["cases"] = tables.merged([case for part in ordered for case in part["cases"]])
    fields["kernels"] = {stage: found for part in ordered for stage, found in part.get("kernels", {}).items()}
    if fields["cases"]:
        try:
            text = tables.markdown({"environment": ordered[0]["environment"], **fields})
        except Exception:  # what took minutes to measure is not lost for a table
            text = traceback.format_exc()
        (results.folder(shapes.DEVICE) / "iteration.md").write_text(text)
    return fields


STEPS = {step.__name__: step for step in (tests, memcheck, racecheck, bench, sweep, iteration)}


def run_step(name: str, seconds: float, chosen: Chosen = Chosen()) -> str:  # noqa: B008 - immutable
    """Run one step, of what is chosen, write its file, and give its status: the worst of its parts."""
    start = monotonic()
    environment = results.environment(shapes.DEVICE)
    path = results.folder(shapes.DEVICE) / f"{name}.json"
    report: dict[str, Any] = {"step": name, "status": FAILED, "environment": environment, "parts": []}
    for part, measured in _all_parts(name, start + seconds, chosen):
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
        print(f"  {part['name']:44s} {part['status']:14s} {part['seconds']:6.1f} s  {counts}".rstrip())
    if report.get("cases") and name != "iteration":
        print("\n".join(results.table(report)), flush=True)
    elif report.get("cases"):
        print((results.folder(shapes.DEVICE) / "iteration.md").read_text(), flush=True)
    return str(report["status"])


def _all_parts(name: str, deadline: float, chosen: Chosen) -> Parts:
    """Those of a step; an error of ours is a part that failed, and the steps after it run."""
    try:
        yield from STEPS[name](deadline, chosen)
    except Exception as error:
        traceback.print_exc()
        lines = traceback.format_exception(error)
        yield {"name": f"the step {name} itself", "seconds": 0.0, **_verdict("".join(lines).splitlines())}, {}


def _worst(statuses: Sequence[str]) -> str:
    return next((status for status in (FAILED, LATE, ABSENT) if status in statuses), PASSED if statuses else FAILED)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that each step may take (default: %(default)s)")
    parser.add_argument("--within", type=float, default=float("inf"), metavar="SECONDS", help="that all of them may take (default: any)")
    parser.add_argument("--operator", nargs="+", default=BENCHMARKS, choices=BENCHMARKS, help="layers: of an iteration, only benchmarks")
    parser.add_argument("--part", nargs="+", default=(), help="of the full-size iteration (default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="how often a full-size iteration is timed (default: %(default)s)")
    parser.add_argument("--compiled", choices=("auto", "never"), default="auto", help="never: bench without torch.compile")
    parser.add_argument("--jobs", type=int, default=JOBS, help="tests and sanitizers that run side by side (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.steps) - STEPS.keys():
        parser.error(f"unknown step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if arguments.part:
        from benchmarks.full_size import PARTS

        if unknown := set(arguments.part) - {*PARTS}:
            parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("error: no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 3
    end = monotonic() + arguments.within
    chosen = Chosen(tuple(arguments.operator), tuple(arguments.part), arguments.jobs, arguments.rounds, arguments.compiled)
    statuses = {}
    for name in arguments.steps or STEPS:
        statuses[name] = run_step(name, min(arguments.seconds, end - monotonic()), chosen)
    print("\n" + ", ".join(f"{name} {status}" for name, status in statuses.items()))
    return {PASSED: 0, ABSENT: 3}.get(_worst(list(statuses.values())), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
