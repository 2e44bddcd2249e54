"""A run that has stopped learning is said to have, in its log and in its report."""

from __future__ import annotations

from typing import Any

import pytest

from arcopo_fast.reports.stall import PATIENCE, notice, stalled_since


def record(step: int, *live: float, steps: float | None = None) -> dict[str, Any]:
    shares = {f"update{update}/live": share for update, share in enumerate(live, start=1)}
    return {"step": step, "steps": float(len(live)) if steps is None else steps} | shares


def run(*lives: tuple[float, ...], start: int = 1) -> list[dict[str, Any]]:
    return [record(step, *live) for step, live in enumerate(lives, start=start)]


def test_a_stall_is_dated_to_its_first_iteration() -> None:
    assert stalled_since(run(*[(0.5, 0.4)] * 7, *[(0.0, 0.004)] * (PATIENCE + 3))) == 8


def test_iterations_without_a_step_are_a_stall_whatever_was_live() -> None:
    assert stalled_since([record(step, steps=0.0) for step in range(5, 5 + PATIENCE)]) == 5


@pytest.mark.parametrize(
    "records",
    [
        [],
        run(*[(1.0, 0.0)] * 30),
        run(*[(0.0, 0.0)] * (PATIENCE - 1)),
        run(*[(0.0, 0.0)] * 20, (0.3, 0.2)),
        [{"step": step} for step in range(20)],
        [{"step": step, "update1/live": None, "steps": 1} for step in range(20)],
    ],
    ids=["none", "the first update is live", "too few", "it went on", "nothing logged", "no numbers"],
)
def test_what_is_no_stall(records: list[dict[str, Any]]) -> None:
    assert stalled_since(records) is None


def test_the_notice_says_when_and_what_to_do() -> None:
    assert "since iteration 41" in notice(41) and "objective.clip" in notice(41)
