"""One weighted total, whoever asks: rewards of weight 0 are watched, so that one of them that fails costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from arcopo_fast.evaluation import judging as evaluation
from arcopo_fast.evaluation.compare import with_total
from arcopo_fast.objectives.advantage import group_advantages, weighted_total, zscore
from arcopo_fast.storage.metrics import TOTAL

WEIGHTS = {"first": 2.0, "watched": 0.0, "second": -0.5}
Components = dict[str, Tensor]


def by_evaluation(components: Components, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """As before and after a run: two batches of videos."""
    count = len(components["first"])
    config: Any = SimpleNamespace(
        rewards=WEIGHTS, evaluation=SimpleNamespace(videos_per_prompt=1, sample_videos=0), rollout=SimpleNamespace(decode_branches=None)
    )
    halves = [slice(0, count // 2), slice(count // 2, count)]
    scored = ({name: values[half] for name, values in components.items()} for half in halves)
    parts = iter([(torch.rand(len(scores["first"]), 2, 3, 16, 16), scores) for scores in scored])
    monkeypatch.setattr(evaluation, "videos_at_once", lambda config: count // 2)
    monkeypatch.setattr(evaluation, "judge", lambda *unused: [next(parts)])
    prompts: Any = [SimpleNamespace(text="a")] * count
    nothing: Any = SimpleNamespace(shape=None, directory=None, model=SimpleNamespace(ranks=1))
    judges: Any = dict.fromkeys(WEIGHTS)
    return evaluation.evaluate(config, nothing, nothing, prompts, judges, {}).scores[TOTAL]


USERS: dict[str, Callable[[Components, pytest.MonkeyPatch], Tensor]] = {
    "itself": lambda components, monkeypatch: weighted_total(components, WEIGHTS),
    "a run's evaluation": by_evaluation,
    "a comparison": lambda components, monkeypatch: torch.tensor(
        [
            with_total({name: values[video].item() for name, values in components.items()}, WEIGHTS)[TOTAL]
            for video in range(len(components["first"]))
        ],
        dtype=torch.float64,
    ),
}


@pytest.mark.parametrize("user", USERS)
def test_a_watched_reward_that_fails_costs_no_total(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    components = {name: torch.randn(6) for name in WEIGHTS}
    components["watched"][[0, 4]] = math.nan
    components["second"][3] = math.nan
    total = USERS[user](components, monkeypatch)
    expected = 2.0 * components["first"].double() - 0.5 * components["second"].double()
    assert total.isnan().tolist() == [False, False, False, True, False, False]
    assert total.dtype == torch.float64 and torch.equal(total.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("combine", ["sum", "per_reward_zscore"])
def test_a_watched_reward_that_fails_costs_no_advantage(combine: Any) -> None:
    components = {name: torch.randn(6) for name in WEIGHTS}
    components["watched"][:] = math.nan
    whole = {"sum": components, "per_reward_zscore": {name: zscore(values) for name, values in components.items()}}[combine]
    advantages = group_advantages(components, WEIGHTS, combine=combine)
    expected = 2.0 * whole["first"].double() - 0.5 * whole["second"].double()
    torch.testing.assert_close(advantages, zscore(expected) if combine == "sum" else expected)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e12])
def test_a_summary_keeps_scores_of_any_size(scale: float) -> None:
    values = torch.rand(5) * scale
    summary = evaluation.Evaluation({"it": values, "constant": torch.full((5,), 0.1 * scale)}, [], values).summary()
    assert torch.equal(torch.tensor(summary["it"]["values"]), values)
    assert summary["it"]["std"] == pytest.approx(values.double().std(correction=0).item(), rel=1e-6) and summary["constant"]["std"] == 0
