"""The steps of `benchmarks.gpu`, each of which yields its parts as they end: what became of a command, and what it measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple
from xml.etree import ElementTree

from arcopo_kernels.aot import OPERATORS

from benchmarks import results, shapes
from benchmarks.commands import ABSENT, AT_WORK, FAILED, KEPT_LINES, PASSED, REPOSITORY, Command, Part, run, side_by_side

SANITIZER_FOUND = 86
"""Exit status of compute-sanitizer when it has found something; the program's own statuses are smaller."""
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
BENCHMARKS = ("vae", "layers", "attention", *(operator for operator in OPERATORS if operator != "attention"))
"""The parts of `bench`; the one in which an iteration spends most of its time comes first."""


class Chosen(NamedTuple):
    """The steps that are wanted.

    benchmarks: of all steps but `iteration`. parts: of that; none: all. jobs: see `JOBS`. rounds: how often an iteration is timed.
    compiled: whether `bench` measures torch.compile too, as its option --compiled says it. longest: see `LONGEST`. seconds: of samples for
    each implementation of a case, None for the benchmarks' own. small: the device is stood in for by the CPU, at sizes that take no time.
    """

    benchmarks: Sequence[str] = BENCHMARKS
    parts: Sequence[str] = ()
    jobs: int = JOBS
    rounds: int = 2
    compiled: str = "auto"
    longest: float = LONGEST
    seconds: float | None = None
    small: bool = False

    @property
    def operators(self) -> list[str]:
        """Those with kernels of their own."""
        return [name for name in self.benchmarks if name in OPERATORS]


Parts = Iterator[tuple[Part, Mapping[str, Any]]]
"""The yield of a step: each of its parts, with what it measured, an object as the benchmarks write it, or nothing."""
INTERPRETED = {"TRITON_INTERPRET": "1"}
"""The environment of a command whose kernels are launched, on a CPU that stands in for the device."""


def look(deadline: float, chosen: Chosen) -> Parts:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "look.json")
        command = Command([sys.executable, "-m", "benchmarks.look", "--write", str(file)], deadline)
        found, begun = dict[str, Any](), monotonic()
        for _ in command:
            if file.exists() and (latest := json.loads(file.read_text())) != found:
                found = latest
                yield {"name": "look", "status": AT_WORK, "seconds": round(monotonic() - begun, 1)}, found
    yield command.outcome.part("look"), found


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
            outcome = run(command, min(deadline, monotonic() + chosen.longest), f"[{Path(name).stem}] ")
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
    sanitizer = [sys.executable, "-m", "benchmarks.stand_in"] if chosen.small else [path] if path else []
    if not sanitizer:
        yield _absent("compute-sanitizer", f"neither on the PATH nor in {toolkit}"), {}
        return
    variables = INTERPRETED if chosen.small else {}
    program = [sys.executable, "-m", "benchmarks.every_kernel"]

    def watch(name: str, *arguments: str, planted: bool = False) -> Part:
        # One allocation for each tensor: in the caching allocator's blocks an access beyond the end of one would meet another.
        command = [*sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), *program, *arguments]
        outcome = run(command, deadline, f"[{name}] ", PYTORCH_NO_CUDA_MEMORY_CACHING="1", **variables)
        found = [int(number) for number in re.findall(r"SUMMARY: (\d+)", "\n".join(outcome.lines))]
        if any("Device not supported" in line for line in outcome.lines):
            return outcome.part(name, ABSENT)
        if planted:
            return outcome.part(name, PASSED if sum(found) else FAILED)
        return outcome.part(name, PASSED if outcome.status == 0 and found and not sum(found) else FAILED, found=sum(found))

    def launch_then_watch(operator: str) -> Part:
        # Compiles: under the sanitizer that takes longer.
        outcome = run([*program, "--operator", operator], deadline, f"[{operator}] ", **variables)
        return watch(operator, "--operator", operator) if outcome.status == 0 else outcome.part(operator)

    if tool == "memcheck":
        control = watch("a planted write out of bounds is found", "--plant", planted=True)
        yield control, {}
        if control["status"] != PASSED:
            return
    for part in side_by_side([partial(launch_then_watch, operator) for operator in chosen.operators], chosen.jobs):
        yield part, {}


def bench(deadline: float, chosen: Chosen) -> Parts:
    seconds = [] if chosen.seconds is None else ["--seconds", str(chosen.seconds)]
    yield from _benchmarks(deadline, chosen, chosen.benchmarks, "--compiled", chosen.compiled, *seconds)


def sweep(deadline: float, chosen: Chosen) -> Parts:
    yield from _benchmarks(deadline, chosen, chosen.operators, "--sweep", "--seconds", str(chosen.seconds or 0.2))


def _benchmarks(deadline: float, chosen: Chosen, operators: Sequence[str], *options: str) -> Parts:
    variables = INTERPRETED if chosen.small else {}
    for operator in operators:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{operator}.py", "-q", "-p", "no:cacheprovider"]
            arguments = ["--benchmark-only", "--results", "part", *options]
            outcome = run([*command, *arguments], min(deadline, monotonic() + chosen.longest), OUT=folder, **variables)
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
    fingerprint = full_size.fingerprint(full_size.small()[0] if chosen.small else None)
    wanted, measured = chosen.parts or full_size.PARTS, _earlier(fingerprint)
    for name in chosen.parts:
        if measured.get(name, {}).get("problems"):
            del measured[name]  # asked for by its name, it is measured anew
    for name in wanted:
        if name in measured:
            part = {"name": name, "seconds": 0.0, "measured": measured[name]["environment"]["date"]}
            yield part | verdict(measured[name].get("problems", [])), _full_size_report(measured, fingerprint)
    left = [name for name in wanted if name not in measured]
    while left:
        progress, at_work = len(left), ""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "parts.json")
            options = ["--write", str(file), "--rounds", str(chosen.rounds), *(["--small"] if chosen.small else [])]
            command = Command([sys.executable, "-m", "benchmarks.full_size", *left, *options], deadline)
            begun, lines = monotonic(), list[str]()
            for line in command:
                lines.append(line)
                announced = full_size.SAID.fullmatch(line)
                if announced is None:
                    continue
                if announced["verdict"] == "begun":
                    begun, lines, at_work = monotonic(), [line], announced["part"]
                    continue
                name, failed, at_work = announced["part"], announced["verdict"] == "failed", ""
                part = {"name": name, "seconds": round(monotonic() - begun, 1), **verdict(lines if failed else [])}
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


def verdict(problems: Sequence[str]) -> Part:
    """Return the fields of a part that say whether it had problems, and which."""
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
    """Return the fields of the step's file, and its tables in iteration.md."""
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
