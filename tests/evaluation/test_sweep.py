"""The dual criterion that chooses a merge's scale, and what its report calls unsure."""

from __future__ import annotations

import math

import pytest

from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.changes import Change
from arcopo_fast.evaluation.sweep import Point, choose_scale, out_of_domain, with_held_out
from arcopo_fast.reports.sweep import result_line


def point(scale: float, in_domain: float, out_of_domain: float, error: float = 0.01) -> Point:
    changes = {"reward": in_domain, "held_out": out_of_domain}
    return Point(scale, {name: Change(name, "total", 0.5, 0.5 + change, error, 0.1, None) for name, change in changes.items()})


UP, DOWN, NAN = 0.25, -0.25, math.nan
CASES: dict[str, tuple[list[tuple[float, float, float]], float | None]] = {
    "the largest of those that improve both": ([(0.0, UP, UP), (0.4, UP, UP), (0.8, UP, DOWN)], 0.4),
    "not the best, the largest": ([(0.0, 9 * UP, 9 * UP), (1.0, UP, UP)], 1.0),
    "improvement need not be monotonic": ([(0.0, UP, UP), (0.5, DOWN, UP), (1.0, UP, UP)], 1.0),
    "in any order": ([(0.9, UP, UP), (0.1, UP, UP)], 0.9),
    "scale 0, the semi-on-policy adapter alone": ([(0.0, UP, UP), (0.5, UP, DOWN)], 0.0),
    "in-domain alone does not do": ([(0.0, DOWN, DOWN), (0.5, UP, DOWN)], None),
    "out-of-domain alone does not do": ([(0.0, DOWN, UP), (0.5, DOWN, UP)], None),
    "a tie is not above": ([(0.0, 0.0, 0.0), (0.5, 0.0, UP), (1.0, UP, 0.0)], None),
    "NaN is not above": ([(0.0, NAN, UP), (0.5, UP, NAN), (1.0, NAN, NAN)], None),
    "nothing": ([], None),
}


@pytest.mark.parametrize(("measured", "expected"), CASES.values(), ids=CASES.keys())
def test_the_dual_criterion(measured: list[tuple[float, float, float]], expected: float | None) -> None:
    chosen = choose_scale([point(*one) for one in measured])
    assert (chosen.scale if chosen else None) == expected


def test_a_choice_within_its_error_is_called_so() -> None:
    assert "within" not in result_line(point(0.5, UP, UP))
    assert "Out-of-domain, the change is within" in result_line(point(0.5, UP, 0.015))
    assert "In-domain and out-of-domain, the change is within" in result_line(point(0.5, UP, UP, error=math.nan))
    assert "No scale" in result_line(None)


def test_a_metric_of_large_numbers_counts_as_much_as_another() -> None:
    """Each by its own standard deviation before; plainly where videos do not vary; missing where one is."""
    baseline = {"a": {"mean": 2.0, "std": 1.0, "values": [1.0, 3.0]}, "b": {"mean": 2000.0, "std": 500.0, "values": [1500.0, 2500.0]}}
    baseline["c"] = {"mean": 4.0, "std": 0.0, "values": [4.0, 4.0]}
    assert with_held_out(baseline, ["a", "b"], baseline)["held_out"]["values"] == [-1.0, 1.0]
    better = {"a": {"values": [2.0, 4.0]}, "b": {"values": [1000.0, 2000.0]}, "c": {"values": [4.5, None]}}
    assert with_held_out(better, ["a", "b"], baseline)["held_out"]["values"] == [-1.0, 1.0]
    found = with_held_out(better, ["a", "c"], baseline)["held_out"]
    assert found["values"] == [0.25, None] and found["mean"] == 0.25


def test_what_is_held_out() -> None:
    config = load_config("toy", ["rewards={toy_vq: 1, toy_mq: 0}"])
    assert out_of_domain(config, ["a", "b"], []) == ["a", "b"]
    assert out_of_domain(config, ["a", "b"], ["b", "toy_mq", "b"]) == ["b", "toy_mq"]
    for metrics, chosen, part in ((["a"], ["toy_vq"], "trains on toy_vq"), (["a"], ["c"], "'c'"), ([], [], "no held-out metrics")):
        with pytest.raises(UserError, match=part):
            out_of_domain(config, metrics, chosen)
