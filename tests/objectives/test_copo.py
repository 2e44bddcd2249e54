"""The AR-CoPO update on a small generator: exact first ratio, the gradient identity, what changes and what does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.adapted import GROUP, adapted_engine, make_group
from torch import Tensor

from arcopo_fast.model.lora import adapter_parameters
from arcopo_fast.objectives.advantage import zscore
from arcopo_fast.objectives.copo import CopoObjective, CopoSettings
from arcopo_fast.objectives.optimizer import GradientNotFinite, Stepper
from arcopo_fast.objectives.ratio import RatioNotOne
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Group, Samples


def run_update(engine: Engine, settings: CopoSettings, group: Group, advantages: Tensor, lr: float = 1e-2) -> dict[str, float]:
    parameters = adapter_parameters(engine.model)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    return CopoObjective(engine, settings).update([(group, advantages)], Stepper(optimizer, gradient_clip=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", ["consistency", "flow_matching"])
@pytest.mark.parametrize("pivot", [0, 3])
def test_ratio_is_exactly_one_before_the_first_update(dtype: torch.dtype, distance: str, pivot: int) -> None:
    engine = adapted_engine(dtype)
    with make_group(engine, pivot) as group:
        statistics = run_update(engine, CopoSettings(distance=distance, anchors_per_update=2), group, zscore(torch.randn(GROUP)))
    assert statistics["update1/ratio_max"] == 0 and statistics["update1/live"] == 1
    assert statistics["update2/ratio_max"] > 0, "after one update the ratio of fresh anchors has moved"
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("tau", [0.2, 5.0, "auto"])
def test_gradient_identity(tau: float | str) -> None:
    """Before the first update the ascent direction at every anchor is (2 / (tau G D)) sum_i A_i x0hat_i."""
    engine, advantages = adapted_engine(), zscore(torch.randn(GROUP))
    settings = CopoSettings(tau=tau)  # type: ignore[arg-type]
    objective = CopoObjective(engine, settings)
    with make_group(engine) as group:
        target = objective.target(group, advantages)
        seen: list[Tensor] = []
        original = engine.predict

        def watched(*arguments: object, **named: object) -> Tensor:
            seen.append(original(*arguments, **named))  # type: ignore[arg-type]
            seen[-1].retain_grad()
            return seen[-1]

        engine.predict = watched  # type: ignore[method-assign]
        items = objective.draw_items(group, 0)
        new = engine.predict(group, group.samples(*items))
        objective.ratio(group, target, group.samples(*items), new, new.detach()).loss.sum().backward()
        (prediction,) = seen
        size = prediction[0].numel()
        ascent = 2 / (target.tau * GROUP * size) * torch.einsum("g,tg...->t...", advantages, group.predictions.double())
        expected = ascent[items.steps]
        torch.testing.assert_close(-prediction.grad.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_where_ranks_share_weights_every_pass_is_made() -> None:
    """The reference is asked again for what it said before, and a group without variance is replayed, but not learned from."""
    engine, passes = adapted_engine(), 0
    predict = engine.predict

    def counted(*arguments: Any, **named: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return predict(*arguments, **named)

    engine.predict = counted  # type: ignore[method-assign]
    made: list[tuple[int, int, float]] = []
    with make_group(engine) as group:
        for engine.model.ranks in (1, 2):
            objective = CopoObjective(engine, CopoSettings(anchors="same"), reference=True)
            stepper = Stepper(torch.optim.AdamW(adapter_parameters(engine.model)))
            for advantages in (zscore(torch.randn(GROUP)), torch.zeros(GROUP)):
                passes = 0
                statistics = objective.update([(group, advantages)], stepper)
                made.append((passes, int(statistics["steps"]), statistics["zero_variance_groups"]))
    # Two updates; without variance on all ranks there is no second one.
    assert made == [(2 + 1, 2, 0), (0, 0, 1), (2 + 2, 2, 0), (1 + 1, 0, 1)]


def test_only_the_adapter_changes() -> None:
    engine = adapted_engine()
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    with make_group(engine) as group:
        run_update(engine, CopoSettings(), group, zscore(torch.randn(GROUP)))
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".lora_" not in name), name


def test_every_adapter_matrix_gets_gradient() -> None:
    """Also those of the cross-attention's keys and values, which a cached prompt would cut off."""
    engine = adapted_engine()
    parameters = adapter_parameters(engine.model)
    objective = CopoObjective(engine, CopoSettings())
    with make_group(engine) as group:
        target = objective.target(group, zscore(torch.randn(GROUP)))
        items = objective.draw_items(group, 0)
        new = engine.predict(group, group.samples(*items))
        objective.ratio(group, target, group.samples(*items), new, new.detach()).loss.sum().backward()
    silent = [name for name, p in engine.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert parameters and not silent


def test_micro_batches_change_nothing_but_rounding() -> None:
    results = []
    engine = adapted_engine()
    start = [parameter.detach().clone() for parameter in adapter_parameters(engine.model)]
    advantages = zscore(torch.randn(GROUP))
    with make_group(engine) as group:
        for size in (None, 3):
            for parameter, value in zip(adapter_parameters(engine.model), start):
                parameter.data.copy_(value)
            statistics = run_update(engine, CopoSettings(anchors_per_update=2, micro_batch=size, updates=1), group, advantages)
            results.append(statistics["gradient_norm"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_no_variance_no_step() -> None:
    engine = adapted_engine()
    before = [parameter.detach().clone() for parameter in adapter_parameters(engine.model)]
    with make_group(engine) as group:
        statistics = run_update(engine, CopoSettings(), group, torch.zeros(GROUP, dtype=torch.float64))
    assert statistics == {"steps": 0.0, "zero_variance_groups": 1.0}
    assert all(torch.equal(a, b) for a, b in zip(before, adapter_parameters(engine.model)))


@pytest.mark.parametrize("distance", ["consistency", "flow_matching"])
def test_updates_move_predictions_towards_good_candidates(distance: str) -> None:
    """After some unclipped updates on one group, the anchors' surrogate probability of well-scored candidates has grown."""
    engine, advantages = adapted_engine(), zscore(torch.randn(GROUP))
    settings = CopoSettings(distance=distance, clip=None, updates=1)  # type: ignore[arg-type]
    with make_group(engine) as group:
        everyone, steps = torch.arange(GROUP), torch.zeros(GROUP, dtype=torch.long)
        with torch.no_grad():
            old = engine.predict(group, group.samples(steps, everyone))
        for _ in range(8):
            run_update(engine, settings, group, advantages, lr=3e-3)
        with torch.no_grad():
            moved = engine.predict(group, group.samples(steps, everyone)) - old
        direction = torch.einsum("g,g...->...", advantages.float(), group.predictions[0])
        assert (moved * direction).sum() > 0


def test_recomputed_context_keeps_the_first_ratio_exact_and_no_page() -> None:
    engine = adapted_engine(branches=GROUP + 2)
    with make_group(engine, pivot=2) as group:
        statistics = run_update(engine, CopoSettings(context="recompute"), group, zscore(torch.randn(GROUP)))
        assert engine.pool.pages_in_use == 4
    assert statistics["update1/ratio_max"] == 0


def test_anchors_are_distinct_and_keyed() -> None:
    engine = adapted_engine()
    objective = CopoObjective(engine, CopoSettings(steps=0.6, skip_last_step=True))
    with make_group(engine) as group:
        items = objective.draw_items(group, 0)
        assert torch.equal(items.anchors, objective.draw_items(group, 0).anchors)
        others = [objective.draw_items(group, update).anchors.tolist() for update in range(1, 6)]
        assert any(other != items.anchors.tolist() for other in others), "later updates draw fresh anchors"
        assert len(set(items.anchors.tolist())) == 4 and items.steps.max() < 2 and len(items.steps) == 4


def test_a_replay_that_is_not_reproducible_is_refused() -> None:
    engine = adapted_engine()
    objective = CopoObjective(engine, CopoSettings())
    original = objective.ratio

    def noisy(group: Group, target: object, samples: Samples, new: Tensor, old: Tensor) -> object:
        return original(group, target, samples, new, old + 1e-3)  # type: ignore[arg-type]

    objective.ratio = noisy  # type: ignore[method-assign, assignment]
    parameters = adapter_parameters(engine.model)
    with make_group(engine) as group, pytest.raises(RatioNotOne, match="must be exactly 0"):
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        objective.update([(group, zscore(torch.randn(GROUP)))], Stepper(optimizer, gradient_clip=1.0))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("update", [1, 2])
def test_no_step_is_taken_along_a_gradient_that_is_not_finite(update: int, bad: float) -> None:
    """One element of one gradient is enough to make every weight NaN: clipping divides all of them by the norm."""
    engine, calls = adapted_engine(), iter(range(1, 100))
    objective, parameters = CopoObjective(engine, CopoSettings(micro_batch=None)), adapter_parameters(engine.model)
    spoil = torch.zeros_like(parameters[3])
    spoil.view(-1)[-1] = bad
    parameters[3].register_hook(lambda gradient: gradient + spoil if next(calls) == update else gradient)
    steps: list[list[Tensor]] = []
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    optimizer.register_step_post_hook(lambda *_: steps.append([parameter.detach().clone() for parameter in parameters]))
    before = [parameter.detach().clone() for parameter in parameters]
    with make_group(engine) as group, pytest.raises(GradientNotFinite, match=f"of update {update} of 2 has the norm (nan|inf): no step"):
        objective.update([(group, zscore(torch.randn(GROUP)))], Stepper(optimizer, gradient_clip=1.0))
    assert len(steps) == update - 1
    assert all(torch.equal(now, then) and now.isfinite().all() for now, then in zip(parameters, [before, *steps][-1]))
