"""Stages add up, nest as they should, and a trace is written."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from arcopo_fast.errors import UserError
from arcopo_fast.runtime import profiling

CPU = torch.device("cpu")


def test_outer_stages_count_and_repeated_ones_add_up() -> None:
    with profiling.record(CPU) as seconds:
        for _ in range(2):
            with profiling.stage("denoise"):
                time.sleep(0.02)
        with profiling.stage("prefix"), profiling.stage("denoise"):
            time.sleep(0.03)
        assert not seconds
    assert list(seconds) == ["prefix", "denoise"], "in the order of an iteration"
    assert seconds["denoise"] >= 0.04 and seconds["prefix"] >= 0.03


def test_an_error_ends_the_recording() -> None:
    with pytest.raises(ZeroDivisionError), profiling.record(CPU), profiling.stage("decode"):
        raise ZeroDivisionError
    with profiling.record(CPU) as seconds, profiling.stage("decode"):
        pass
    assert set(seconds) == {"decode"}
    with pytest.raises(RuntimeError, match="already"), profiling.record(CPU), profiling.record(CPU):
        pass


def test_outside_of_a_recording_stages_do_nothing() -> None:
    with profiling.stage("decode"):
        pass
    with profiling.record(CPU) as seconds:
        pass
    assert seconds == {}


@pytest.mark.parametrize("ends_early", [False, True])
def test_a_trace_shows_the_stages(tmp_path: Path, ends_early: bool) -> None:
    path = tmp_path / "profile" / "trace.json.gz"
    trace = profiling.Trace(2, of=5)
    with trace.to(path):
        for _ in range(2 if ends_early else 5):
            with profiling.record(CPU), profiling.stage("replay"):
                torch.randn(8, 8) @ torch.randn(8, 8)
            trace.step()
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("replay") == (1 if ends_early else 2) and "aten::mm" in names


def test_no_trace_and_one_that_does_not_fit(tmp_path: Path) -> None:
    trace = profiling.Trace(0, of=1)
    with trace.to(tmp_path / "trace.json.gz"):
        trace.step()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--profile 3 needs 4 iterations.*train.iterations is 3"):
        profiling.Trace(3, of=3)
