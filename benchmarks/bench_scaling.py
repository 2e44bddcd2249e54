"""The gain of a second rank: two processes of one thread against one, on the same groups of the shipped toy recipe.

On a CPU of two cores or more, asked for by name; some minutes:

    pytest benchmarks/bench_scaling.py --benchmark-only -m slow --results scaling

A sample is one iteration of two groups at each pivot. All jobs are started first and then sampled in turn, so that start-up is not counted
and a busy moment of the machine meets them all. The table is written as Markdown beside the JSON.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Literal

import pytest

from arcopo_fast.build import generator_sizes
from arcopo_fast.config.reading import load_config
from arcopo_fast.planning.work import Work, iteration, lora_parameters
from arcopo_fast.runtime.profiling import STAGES
from benchmarks import results, shapes
from benchmarks.jobs import Job
from benchmarks.measure import Bench
from benchmarks.results import OURS
from benchmarks.timing import Ceilings, Timing, measure_ceilings

GROUPS = 2
"""Groups of an iteration, one for each rank."""
ROUNDS = 6
ONE = "reference"
NAMES = {
    OURS: "two ranks, groups spread",
    ONE: "one process",
    "branches": "two ranks, branches spread",
}
"""The jobs. Every process has one thread."""


def jobs(settings: Sequence[str], start: Literal["spawn", "fork"] = "spawn") -> dict[str, Job]:
    """Return the jobs that are compared; none has begun."""
    settings = [f"rollout.prompts_per_iteration={GROUPS}", *settings]
    spread = {kind: [*settings, f"train.spread={kind}"] for kind in ("groups", "branches")}
    return {
        OURS: Job(2, spread["groups"], start),
        ONE: Job(1, settings, start),
        "branches": Job(2, spread["branches"], start),
    }


def busy_seconds() -> float:
    """Return the CPU time that was taken, by all processes of the machine and by other machines on the same cores."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(fields) - sum(fields[3:5])) / os.sysconf("SC_CLK_TCK")


class Race:
    """Samples of several jobs, taken in turn; the order rotates from round to round.

    Attributes:
        rounds: seconds of a sample, by job, for each round.
        others: the share of the machine's cores that other programs had in the meantime, likewise.
        numbers: the iterations of a sample.
    """

    def __init__(self, started: Mapping[str, Job]) -> None:
        self.started = started
        self.rounds: list[dict[str, float]] = []
        self.others: list[dict[str, float]] = []
        self.numbers: list[int] = next(iter(started.values())).ask("each_pivot")

    def round(self) -> float:
        """Take one more sample of each; return the seconds of ours."""
        names, shift = list(self.started), len(self.rounds) % len(self.started)
        taken, others = dict[str, float](), dict[str, float]()
        for name in names[shift:] + names[:shift]:
            job = self.started[name]
            start, away = perf_counter(), busy_seconds() - job.cpu_seconds()
            job.iterate(self.numbers)
            taken[name] = perf_counter() - start
            away = busy_seconds() - job.cpu_seconds() - away
            others[name] = max(0.0, away / taken[name] / (os.cpu_count() or 1))
        self.others.append(others)
        self.rounds.append(taken)
        return taken[OURS]

    def agree(self) -> bool:
        """Return whether groups spread over two ranks have made the adapter of one process, bit for bit."""
        return self.started[OURS].ask("checksum") == self.started[ONE].ask("checksum")


def figures(race: Race, settings: Sequence[str], ceilings: Ceilings, rounds: int) -> dict[str, Any]:
    """Return the figures of the last `rounds` rounds, as `measure.Bench` gives those of an operator, and more. Times are of a group.

    `scaling` has the ratio of each round: groups a minute of two ranks over those of one process. `reduce`: of one optimizer step.
    """
    config, taken = load_config("toy", settings), race.rounds[-rounds:]
    groups, updates = GROUPS * len(race.numbers), config.objective.updates
    sizes = generator_sizes(config.generator.checkpoint, config.generator.base)
    works = [sum(iteration(config, sizes.transformer, sizes.vae, pivot).values(), Work()) for pivot in range(len(race.numbers))]
    flops, traffic = (sum(getattr(work, name) for work in works) / len(works) for name in ("flops", "traffic"))
    floor = flops / ceilings.matmul + traffic / ceilings.bandwidth
    timings = {name: _timing([seconds[name] / groups for seconds in taken]) for name in taken[0]}
    stages = {name: _medians(job.stages[-rounds:]) for name, job in race.started.items()}
    summed = 8 * lora_parameters(config, sizes.transformer)
    return {
        "operator": "scaling",
        "mode": "rollout+update",
        "case": "toy, two ranks",
        "implementation": None,
        "limit": "matmul",
        "flops": flops,
        "bytes": traffic,
        "floor": floor,
        "of_ceiling": floor / timings[OURS].median,
        "ratios": {"reference": timings[ONE].median / timings[OURS].median, "compiled": None, "best": None},
        "best": None,
        "alternatives": [name for name in timings if name not in (OURS, ONE)],
        "variants": {name: {**timing._asdict(), "error": None} for name, timing in timings.items()},
        "groups_per_minute": {name: 60 / timing.median for name, timing in timings.items()},
        "scaling": [seconds[ONE] / seconds[OURS] for seconds in taken],
        "stages": stages,
        "reduce": {
            "seconds": stages[OURS].get("reduce", 0.0) / updates,
            "wait": stages[OURS].get("wait", 0.0) / updates,
            "bytes": summed,
            "floor": 2 * summed / ceilings.bandwidth,  # read and written once
        },
        "others": {name: median(shares[name] for shares in race.others[-rounds:]) for name in taken[0]},
    }


def _timing(samples: Sequence[float]) -> Timing:
    q1, middle, q3 = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [*samples] * 3
    return Timing(middle, q1, q3, len(samples), 0.0)


def _medians(taken: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: median(seconds.get(name, 0.0) for seconds in taken) for name in STAGES if any(name in seconds for seconds in taken)}


def markdown(environment: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    """Return the tables for people."""
    reduce, scaling, stages, busy = case["reduce"], case["scaling"], case["stages"], case["others"]
    lines = [
        "# Two ranks against one process, toy",
        "",
        f"{environment['device']}, {os.cpu_count()} cores, torch {environment['torch']}, commit {environment['commit']}, "
        f"{environment['date']}. The same groups,",
        f"{len(scaling)} rounds in turn, medians. Every process has one thread. Start-up is not counted. Other programs of the machine had",
        f"{busy[OURS]:.1%} of the cores while two ranks worked, and {busy[ONE]:.1%} while one process did, which leaves a core to them.",
        "",
        "| | s / group | groups / minute | times one process |",
        "|---|---|---|---|",
    ]
    rates = case["groups_per_minute"]
    for name, rate in rates.items():
        lines.append(f"| {NAMES[name]} | {case['variants'][name]['median']:.3f} | {rate:.1f} | {rate / rates[ONE]:.2f} |")
    lines += [
        "",
        f"Groups a minute of two ranks over those of one process, round by round: median **{median(scaling):.2f}**, from "
        f"{min(scaling):.2f} to {max(scaling):.2f}.",
        "Two ranks have made the adapter of one process, bit for bit, where groups are spread.",
        "",
        "One process keeps one group at a time: its later update rebuilds both groups' contexts. A rank with one group keeps it. So two",
        "ranks can be more than twice as fast.",
        "",
        f"An optimizer step sums {reduce['bytes'] / 1e6:.1f} MB over the ranks, float64, in {results.duration(reduce['seconds'])}, after "
        f"{results.duration(reduce['wait'])} of waiting for the slower rank.",
        f"Floor: {results.duration(reduce['floor'])}, the time to read and write it once at the rate of a copy.",
        "",
        "Seconds of an iteration by stage, means over the ranks:",
        "",
        f"| stage | {' | '.join(NAMES[name] for name in stages)} |",
        f"|---|{'---|' * len(stages)}",
    ]
    for stage in STAGES:
        if any(stage in seconds for seconds in stages.values()):
            cells = " | ".join(f"{seconds[stage]:.3f}" if stage in seconds else "-" for seconds in stages.values())
            lines.append(f"| {stage} | {cells} |")
    return "\n".join(lines) + "\n"


_seconds = 0.0


def clock() -> float:
    """pytest-benchmark's timer: it advances by our samples alone."""
    return _seconds


@pytest.mark.slow
@pytest.mark.skipif(shapes.DEVICE.type == "cuda" or (os.cpu_count() or 1) < 2, reason="needs two cores, and no GPU")
@pytest.mark.benchmark(timer=clock)
def test_scaling(bench: Bench, ceilings: Ceilings, request: pytest.FixtureRequest) -> None:
    bench.figures |= {"operator": "scaling", "mode": "rollout+update", "case": "toy, two ranks"}

    def one_round() -> None:
        global _seconds
        _seconds += race.round()

    with ExitStack() as stack:
        race = Race({name: stack.enter_context(job) for name, job in jobs([]).items()})
        bench.benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
        assert race.agree(), "two ranks have made another adapter than one process"
    again = measure_ceilings(bench.timer)  # what else a CPU has to do must not lower them
    best = Ceilings(*(max(rates) for rates in zip(ceilings, again)))
    bench.figures |= figures(race, [], best, ROUNDS)
    text = markdown(results.environment(shapes.DEVICE), bench.figures)
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():  # type: ignore[union-attr]
        print(f"\n{text}")
    if name := request.config.option.results:
        (results.folder(shapes.DEVICE) / f"{name}.md").write_text(text)
