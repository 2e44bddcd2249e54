"""A whole AR-CoPO iteration: the engine against the reference path of `benchmarks/reference/`, pivot by pivot.

On a CPU `pytest benchmarks/` runs it at a size that is good for nothing else. The shipped toy recipe, with its groups of twelve, takes
minutes and is asked for by name:

    pytest benchmarks/bench_iteration.py --benchmark-only -m slow --results iteration
    pytest benchmarks/bench_iteration.py --benchmark-only -m slow --results iteration-sweep --sweep

The second one measures how the engine's cost grows with the group, the steps, the length and the resolution. Both write their tables as
Markdown beside the JSON. The full size, on a GPU, is measured in parts: `make gpu-iteration`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest

from arcopo_fast.runtime.memory import tune_for_cpu
from benchmarks import iteration, results, shapes, tables
from benchmarks.iteration import OurPath, ReferencePath, Samples, Scene
from benchmarks.measure import Bench
from benchmarks.results import OURS
from benchmarks.timing import Ceilings, Comparison, Timer, Timing, measure_ceilings

SMALL = ("video.chunks=2", "sampler.steps=[1000, 350]", "rollout.group_size=3", "objective.anchors_per_update=2", "lora.rank=2")


class Shape(NamedTuple):
    """A case: the recipe's overrides, and the pivot, from 0, or what is varied and which value. `--sweep` keeps one case a `model`."""

    model: str
    overrides: tuple[str, ...] = ()
    pivot: int = 0
    varied: tuple[str, int] | None = None


TOY = [Shape(f"toy-p{pivot + 1}", pivot=pivot) for pivot in range(4)]
VARIED = {"group": 4, "steps": 4, "length": 4, "resolution": 3}
SWEEP = [Shape(f"toy-{what}-{index}", varied=(what, index)) for what, count in VARIED.items() for index in range(count)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    slow = SWEEP if metafunc.config.option.sweep else TOY
    cases = [pytest.param(shape, marks=pytest.mark.slow, id=shape.model) for shape in slow]
    if not metafunc.config.option.sweep:
        cases.append(pytest.param(Shape("small-p2", SMALL, pivot=1), id="small-p2"))
    metafunc.parametrize("shape", cases if shapes.DEVICE.type == "cpu" else [])


@cache
def scene_of(overrides: tuple[str, ...]) -> Scene:
    if not overrides:
        tune_for_cpu()  # as `train` does; it holds for the whole process, hence for both paths
    return iteration.toy(*overrides)


@pytest.fixture(scope="module")
def best(ceilings: Ceilings, timer: Timer) -> Ceilings:
    """The best of three measurements of the ceilings: what else a CPU has to do must not lower them."""
    measured = [ceilings, measure_ceilings(timer), measure_ceilings(timer)]
    return Ceilings(max(one.bandwidth for one in measured), max(one.matmul for one in measured))


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, best: Ceilings) -> Iterator[list[dict[str, Any]]]:
    """Gathers the cases; prints their tables, and writes them as NAME.md with --results NAME."""
    cases: list[dict[str, Any]] = []
    yield cases
    if cases:
        text = tables.markdown({"environment": results.environment(shapes.DEVICE), "ceilings": best._asdict(), "cases": cases})
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():  # type: ignore[union-attr]
            print(f"\n{text}")
        if name := request.config.option.results:
            (results.folder(shapes.DEVICE) / f"{name}.md").write_text(text)


_seconds = 0.0


def clock() -> float:
    """pytest-benchmark's timer: it advances by the engine's samples alone."""
    return _seconds


@pytest.mark.benchmark(timer=clock)
def test_iteration(bench: Bench, best: Ceilings, report: list[dict[str, Any]], shape: Shape) -> None:
    scene = scene_of(shape.overrides)
    pivot = shape.pivot
    if shape.varied:
        what, index = shape.varied
        scene = iteration.sweep(scene, what)[index]
        pivot = scene.middle
    bench.figures |= {"operator": "iteration", "mode": "rollout+update", "case": f"{scene.name} p={pivot + 1}"}
    samples = {OURS: Samples(ours := OurPath(scene.copy(), pivot))}
    more: dict[str, Any] = {"varied": shape.varied[0]} if shape.varied else {}
    if not shape.varied:
        reference = ReferencePath(scene.copy(), pivot)
        more["agreement"] = iteration.agreement(ours, reference)
        samples["reference"] = Samples(reference)
    comparison = Comparison(bench.timer, samples, bench.seconds)

    def one_round() -> None:
        global _seconds
        _seconds += comparison.round()[OURS]

    bench.benchmark.pedantic(one_round, rounds=comparison.rounds)
    timings: dict[str, Timing] = comparison.timings()
    stages = {name: samples[name].medians(timing.rounds) for name, timing in timings.items()}
    bench.figures |= iteration.case(scene, pivot, best, timings, stages, memory=iteration.memory(ours), **more)
    report.append(bench.figures)
    assert not iteration.problems(ours)
