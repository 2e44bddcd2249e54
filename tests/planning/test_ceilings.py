"""The yardstick of a run's times: what the device reaches, and what a report makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.runs import Page, evaluation, settings, write_run

from arcopo_fast.config.reading import load_config
from arcopo_fast.model.sizes import CausalWanConfig, VAESizes
from arcopo_fast.planning.ceilings import Ceilings, measure_ceilings
from arcopo_fast.planning.work import floors, iteration
from arcopo_fast.reports.results import DEVICE, stage_floors
from arcopo_fast.reports.run import write_report
from arcopo_fast.storage.identity import version_of


def test_ceilings_are_those_of_a_machine() -> None:
    """Between a very slow and an impossible one."""
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < ceilings.bandwidth < 1e13 and 1e8 < ceilings.matmul < 1e15
    assert Ceilings(2.0, 10.0).seconds(30.0, 8.0) == 7.0


def test_a_version_of_what_is_not_installed_is_none() -> None:
    """As of this package itself, where it lies on PYTHONPATH."""
    plain = torch.__version__.partition("+")[0]  # a build's own suffix is not in the metadata of every wheel
    assert (version_of("torch") or "").partition("+")[0] == plain and version_of("arcopo-fast-of-another-world") is None


def test_floors_are_the_counted_work_at_the_ceilings() -> None:
    config = load_config("bench_1_3b", ["rollout.prompts_per_iteration=3"])
    ceilings = Ceilings(4e12, 800e12)
    found = floors(config, CausalWanConfig(), VAESizes(), ceilings)
    assert list(found) == [1, 2, 3, 4, 5, 6, 7]
    work = iteration(config, CausalWanConfig(), VAESizes(), 3)
    assert found[4].keys() == work.keys() >= {"prefix", "denoise", "clean", "decode", "replay", "optimizer"}
    for stage, seconds in found[4].items():
        assert seconds == pytest.approx(3 * (work[stage].flops / 800e12 + work[stage].traffic / 4e12))
    assert "prefix" not in found[1] and found[7]["denoise"] < found[1]["denoise"]
    assert floors(load_config("toy_sde_grpo"), CausalWanConfig(), VAESizes(), ceilings) == {}


def test_the_floor_of_the_pivots_that_there_were() -> None:
    device = {"floor": {"1": {"denoise": 4.0, "prefix": 1.0}, "2": {"denoise": 2.0}}}
    records = [{"pivot": 1.0, "time": {"denoise": 8.0}}, {"pivot": 2.0, "time": {"denoise": 8.0}}, {"pivot": 2.0, "time": {"denoise": 8.0}}]
    assert stage_floors(records, device) == pytest.approx({"denoise": 8 / 3, "prefix": 1 / 3})
    assert stage_floors([*records, {"pivot": 1.5, "time": {"denoise": 8.0}}], device) == pytest.approx({"denoise": 3.0, "prefix": 0.5})
    assert stage_floors(records, {}) == stage_floors([], device) == {}


def test_a_report_shows_the_percent_of_the_floor(tmp_path: Path) -> None:
    run = write_run(tmp_path, document=evaluation())
    pivots = range(1, settings(tmp_path).video.count + 1)
    floor = {pivot: {"rollout": 1.5, "update": 0.25} for pivot in pivots}  # of the 3 s and 1 s that the run logged
    device = {"device": "a <machine>", "dtype": "float32", "matmul": 2.5e12, "bandwidth": 1e11, "floor": floor}
    (run / DEVICE).write_text(json.dumps(device))
    text = Page(write_report(run)).text
    assert "rollout 3.000 75 % 50 %" in text and "update 1.000 25 % 25 %" in text and "an iteration 4.000 44 %" in text
    assert "a <machine>: a float32 matrix product reaches 2.5 TFLOP/s, a copy 100 GB/s" in text
    (run / DEVICE).write_text("{")  # it only adds to what is shown
    assert "rollout 3.000 75 %" in Page(write_report(run)).text
