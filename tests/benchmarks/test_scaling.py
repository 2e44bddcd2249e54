"""The benchmark of two ranks runs at a small size, and what it writes is complete."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.ranks import load_libraries

from benchmarks import bench_scaling, results
from benchmarks.bench_iteration import SMALL
from benchmarks.bench_scaling import ONE, OURS, Race
from benchmarks.timing import Ceilings


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads the CPU time of all processes")
def test_the_benchmark_runs_and_says_everything() -> None:
    load_libraries()
    with ExitStack() as stack:
        jobs = bench_scaling.jobs(SMALL, "fork")
        race = Race({name: stack.enter_context(jobs[name]) for name in (OURS, ONE)})
        race.round()
        assert race.agree() and len(race.numbers) == 2
    case = bench_scaling.figures(race, SMALL, Ceilings(bandwidth=1e10, matmul=1e11), 1)
    assert case["groups_per_minute"].keys() == {OURS, ONE} and case["scaling"] == [pytest.approx(case["ratios"]["reference"])]
    assert {"wait", "reduce", "optimizer"} <= case["stages"][OURS].keys() and "reduce" not in case["stages"][ONE]
    assert case["reduce"]["floor"] > 0 and 0 < case["reduce"]["seconds"] < sum(case["stages"][OURS].values())
    assert sum(case["stages"][ONE].values()) * 2 == pytest.approx(race.rounds[0][ONE], rel=0.25), "two iterations"
    text = bench_scaling.markdown(results.environment(torch.device("cpu")), case)
    assert f"| one process | {case['variants'][ONE]['median']:.3f} |" in text and "\n| reduce |" in text
