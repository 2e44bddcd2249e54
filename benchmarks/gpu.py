"""Everything that needs a GPU. Without a STEP: nine minutes of it, the most telling first.

    python -m benchmarks.gpu [STEP ...] [--within SECONDS] [--operator NAME ...] [--part NAME ...] [--dry-run]

    look         versions, the attention backends at real lengths, the host's time of a block against the device's
    tests        the GPU tests of the kernels and the engine, pytest -m gpu, one process for each file
    memcheck     compute-sanitizer's search for bad memory accesses, over `every_kernel`, one process for each operator
    iteration    a whole iteration at full size, the parts of `full_size.PARTS`, in one process
    bench        the benchmarks, one process for each operator, for the layers of an iteration, for the VAE
    racecheck    compute-sanitizer's search for hazards in shared memory
    sweep        the benchmarks of other block sizes than the heuristics'

Without a STEP they run as `SCHEDULE` says, all within --within seconds. With some, those in the order given, each within --seconds; of all
operators and parts, or some. Processes of tests and sanitizers run side by side, --jobs of them: mostly they compile. --dry-run needs no
GPU, and finds what would waste the time of one: every command runs, at sizes that take no time, on a CPU that stands in for the device.

Each step writes STEP.json to $OUT when that is set, else to benchmarks/results/<device>/, anew after each of its parts, and when it is told
to end (SIGTERM). Exit status 1 if something failed or did not end in time, 3 if nothing did, but a step could not run here (no GPU, no
compute-sanitizer) and so says nothing.

`iteration` takes longer than ten minutes: run it again until it has passed. What it measured is kept, and not measured again while sources
and settings are the same; a part by its name is `--part engine-p1`. Beside its JSON it writes the same as tables, iteration.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from time import monotonic
from typing import Any, NamedTuple

import torch

from benchmarks import commands, gpu_steps, results, shapes
from benchmarks.commands import ABSENT, AT_WORK, FAILED, LATE, PASSED
from benchmarks.gpu_steps import BENCHMARKS, JOBS, Chosen, Parts, verdict

SECONDS = 570.0
"""Seconds that a step may take: ten minutes, less what a start and a last file take."""
WITHIN = 535.0
"""Seconds that the schedule may take: nine minutes, less what a start and a last file take."""
STEPS = {
    step.__name__: step
    for step in (
        gpu_steps.look,
        gpu_steps.tests,
        gpu_steps.memcheck,
        gpu_steps.iteration,
        gpu_steps.bench,
        gpu_steps.racecheck,
        gpu_steps.sweep,
    )
}


class Stage(NamedTuple):
    """A part of the schedule: a step, the seconds that it may take, and in which fields its choice differs."""

    step: str
    seconds: float
    choice: dict[str, Any]


FIRST_BENCHMARKS = ("attention", "vae", "lora_linear", "layers")
MIDDLE_PARTS = ("engine-p4", "profile-p4", "reference-p4")
SCHEDULE = (
    Stage("look", 40, {}),
    Stage("tests", 150, {}),
    Stage("memcheck", 90, {}),
    Stage("iteration", 150, {"parts": MIDDLE_PARTS, "rounds": 1}),
    Stage("bench", 120, {"benchmarks": FIRST_BENCHMARKS, "compiled": "never", "seconds": 0.2, "longest": 60.0}),
    # With what is left.
    Stage("iteration", SECONDS, {"rounds": 1}),
    Stage("bench", SECONDS, {"benchmarks": tuple(name for name in BENCHMARKS if name not in FIRST_BENCHMARKS)}),
    Stage("racecheck", SECONDS, {}),
    Stage("sweep", SECONDS, {}),
)
"""A step comes twice where what it tells first is worth more than the rest."""


Reports = dict[str, dict[str, Any]]
"""The content of the files that were written, by step."""


def run_step(name: str, seconds: float, chosen: Chosen = Chosen(), reports: Reports | None = None) -> str:  # noqa: B008 - immutable
    """Run one step, of what is chosen, write its file, and return its status: the worst of its parts.

    reports: where the step is among them, the new parts join those that its file has.
    """
    start = monotonic()
    path = results.folder(shapes.DEVICE) / f"{name}.json"
    new = {"step": name, "environment": results.environment(shapes.DEVICE), "parts": [], "seconds": 0.0}
    report = ({} if reports is None else reports).setdefault(name, new)
    before, parts = report["seconds"], {part["name"]: part for part in report["parts"]}
    report["status"] = FAILED
    for part, measured in _all_parts(name, start + seconds, chosen):
        parts[part["name"]] = part
        report["parts"] = [*parts.values()]
        if name in ("iteration", "look"):
            report |= measured
        elif measured:
            report["ceilings"] = measured["ceilings"]  # those of the last part stand for all: the device is one
            report.setdefault("cases", []).extend(measured["cases"])
        report["seconds"] = round(before + monotonic() - start, 1)
        results.write(path, report)
    report["status"] = worst([part["status"] for part in report["parts"]])
    if name == "tests" and not chosen.small and not sum(part.get("passed", 0) for part in report["parts"]):
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
    """Yield those of a step; an error of ours is a part that failed, and the steps after it run."""
    try:
        yield from STEPS[name](deadline, chosen)
    except Exception as error:
        traceback.print_exc()
        lines = traceback.format_exception(error)
        yield {"name": f"the step {name} itself", "seconds": 0.0, **verdict("".join(lines).splitlines())}, {}


def worst(statuses: Sequence[str]) -> str:
    """Return the status that stands for all: of no part at all, that it failed."""
    return next((status for status in (FAILED, AT_WORK, LATE, ABSENT) if status in statuses), PASSED if statuses else FAILED)


def run_schedule(within: float, chosen: Chosen, narrowed: bool) -> dict[str, str]:
    """Run the schedule, and return the status of each step.

    Args:
        within: seconds.
        narrowed: the operators in `chosen` are fewer than all: of those that a stage names, these.
    """
    end, statuses, reports = monotonic() + within, dict[str, str](), Reports()
    for step, seconds, choice in SCHEDULE:
        choice = dict(choice)
        if chosen.small:  # what else they say is for a device
            seconds = SECONDS
            choice = {name: value for name, value in choice.items() if name in ("parts", "benchmarks")}
        if narrowed:
            named = choice.get("benchmarks", chosen.benchmarks)
            choice["benchmarks"] = tuple(name for name in named if name in chosen.benchmarks)
        if chosen.parts:
            choice["parts"] = tuple(name for name in choice.get("parts") or chosen.parts if name in chosen.parts)
        if not choice.get("benchmarks", True) or (chosen.parts and not choice["parts"]):
            continue  # nothing of what is asked for
        statuses[step] = run_step(step, min(seconds, end - monotonic()), chosen._replace(**choice), reports)
    return statuses


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (default: the schedule)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that each step may take (default: %(default)s)")
    parser.add_argument("--within", type=float, metavar="SECONDS", help=f"that all may take (default: {WITHIN:.0f}; with STEPs, any)")
    parser.add_argument("--operator", nargs="+", default=BENCHMARKS, choices=BENCHMARKS, help="vae, layers: benchmarks only")
    parser.add_argument("--part", nargs="+", default=(), help="of the full-size iteration (default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="how often a full-size iteration is timed (default: %(default)s)")
    parser.add_argument("--compiled", choices=("auto", "never"), default="auto", help="never: bench without torch.compile")
    parser.add_argument("--jobs", type=int, default=JOBS, help="tests and sanitizers that run side by side (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="everything on a CPU, at sizes that take no time")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.steps) - STEPS.keys():
        parser.error(f"unknown step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if arguments.part:
        from benchmarks.full_size import PARTS

        if unknown := set(arguments.part) - {*PARTS}:
            parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if problem := _without_device(arguments.dry_run):
        print(f"error: {problem}", file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, commands.stop)
    chosen = Chosen(tuple(arguments.operator), tuple(arguments.part), arguments.jobs, arguments.rounds, arguments.compiled)
    if arguments.dry_run:
        chosen = chosen._replace(rounds=1, compiled="never", seconds=0.005, small=True)
        os.environ.setdefault("OUT", tempfile.mkdtemp(prefix="arcopo-gpu-dry-run-"))
    if arguments.steps:
        end = monotonic() + (float("inf") if arguments.within is None else arguments.within)
        statuses = {name: run_step(name, min(arguments.seconds, end - monotonic()), chosen) for name in arguments.steps}
    else:
        within = arguments.within or (float("inf") if arguments.dry_run else WITHIN)
        statuses = run_schedule(within, chosen, narrowed={*chosen.benchmarks} < {*BENCHMARKS})
    print("\n" + ", ".join(f"{name} {status}" for name, status in statuses.items()))
    return {PASSED: 0, ABSENT: 3}.get(worst(list(statuses.values())), 1)


def _without_device(dry_run: bool) -> str | None:
    if not dry_run:
        return None if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"
    return "there is a GPU, which a dry run does without: set CUDA_VISIBLE_DEVICES=''" if torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
