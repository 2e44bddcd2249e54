"""Steps do not depend on the scale of the loss: eps and a norm limit are relative to the gradient. A gradient of zero takes no step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.adapted import GROUP, adapted_engine, fresh_engine, make_group
from torch import Tensor, nn

from arcopo_fast.model.lora import adapter_parameters
from arcopo_fast.objectives.advantage import zscore
from arcopo_fast.objectives.copo import CopoObjective, CopoSettings
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.objectives.ratio import Ratio

LR = 1e-3


class Scaled(CopoObjective):
    """AR-CoPO with its loss times a factor."""

    factor = 1.0

    def ratio(self, *arguments: Any) -> Ratio:
        outcome = super().ratio(*arguments)
        return outcome._replace(loss=outcome.loss * self.factor)


def adam(parameters: Sequence[nn.Parameter], **settings: Any) -> Stepper:
    return Stepper(torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0), eps=1e-8, **settings)


@pytest.mark.parametrize("engine", [fresh_engine, adapted_engine], ids=["a new adapter", "an adapter in training"])
@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("factor", [2.0**-13, 2.0**-20, 2.0**20, 1e-4])
def test_an_update_does_not_depend_on_the_scale_of_the_loss(engine: Any, updates: int, factor: float) -> None:
    """A power of two rounds nothing. Another factor rounds every gradient anew: that shows only where terms of a gradient cancel."""
    one_engine, advantages = engine(), zscore(torch.randn(GROUP))
    parameters = adapter_parameters(one_engine.model)
    start = [parameter.detach().clone() for parameter in parameters]
    moves = []
    with make_group(one_engine) as group:
        for scale in (1.0, factor):
            for parameter, value in zip(parameters, start):
                parameter.data.copy_(value)
            objective = Scaled(one_engine, CopoSettings(updates=updates, clip=1e-2))
            objective.factor = scale
            objective.update([(group, advantages)], adam(parameters, relative_clip=1.0))
            moves.append(torch.cat([(parameter.detach() - value).flatten() for parameter, value in zip(parameters, start)]) / LR)
    assert moves[0].abs().max() > 0.5
    apart = (moves[0] - moves[1]).abs()
    if factor == 1e-4:
        assert apart.median() < 1e-4 and (apart > 0.01).double().mean() < 0.02
    else:  # but for the few elements whose squares leave float32's range
        assert apart.median() == 0 and (apart > 1e-3).double().mean() < 1e-3


def full_size_gradients() -> list[nn.Parameter]:
    """lora_B and lora_A with gradients as they are at 480x832: medians near 4e-8 and 1e-10."""
    parameters = [nn.Parameter(torch.randn(500, 8)), nn.Parameter(torch.randn(8, 500))]
    for parameter, median in zip(parameters, (4e-8, 1e-10)):
        parameter.grad = median / 0.6745 * torch.randn_like(parameter)
    return parameters


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-10])
def test_at_full_size_every_element_takes_a_whole_first_step(scale: float) -> None:
    parameters = full_size_gradients()
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad *= scale
    start = [parameter.detach().clone() for parameter in parameters]
    absolute = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for parameter, other in zip(parameters, absolute):
        other.grad = parameter.grad.clone() if parameter.grad is not None else None
    taken = adam(parameters).take()
    moved = [((parameter.detach() - value).abs() / LR).median().item() for parameter, value in zip(parameters, start)]
    assert min(moved) > 0.99 and taken.below_eps < 1e-2
    torch.optim.AdamW(absolute, lr=LR, weight_decay=0.0).step()
    assert ((absolute[1].detach() - start[1]).abs() / LR).median() < 0.02, "with an absolute eps of 1e-8 lora_A hardly trains"


def test_the_share_below_eps_counts_what_adam_shortens() -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    gradient = torch.ones(1000)
    gradient[:100], gradient[100:350] = 0.0, 1e-9
    parameter.grad = gradient
    step = adam([parameter]).take()
    assert step.below_eps == pytest.approx(250 / 900)
    assert parameter.detach()[100:350].abs().max() < 0.2 * LR


def test_a_pivot_with_large_gradients_does_not_drown_the_others() -> None:
    """The relative limit is in units of earlier norms, so it acts the same at any scale; the absolute one of 1.0 acts at none."""
    for scale in (1.0, 1e-6):
        parameter = nn.Parameter(torch.zeros(64))
        stepper = Stepper(torch.optim.SGD([parameter], lr=1.0), relative_clip=1.5)
        moves = []
        for norm in (1.0, 1.0, 1.0, 8.0, 1.0):
            before = parameter.detach().clone()
            parameter.grad = scale * norm * nn.functional.normalize(torch.randn(64), dim=0)
            stepper.take()
            moves.append((parameter.detach() - before).norm().item() / scale)
        assert moves == pytest.approx([1.0, 1.0, 1.0, 1.5, 1.0], rel=1e-4)


@pytest.mark.parametrize("clip", [{"gradient_clip": 0.5}, {"gradient_clip": 0.5, "relative_clip": 100.0}])
def test_the_absolute_limit_is_what_it_is_called(clip: dict[str, float]) -> None:
    parameter = nn.Parameter(torch.zeros(64))
    parameter.grad = 4.0 * nn.functional.normalize(torch.randn(64), dim=0)
    step = Stepper(torch.optim.SGD([parameter], lr=1.0), **clip).take()
    assert step.clipped and step.norm == pytest.approx(4.0) and parameter.detach().norm().item() == pytest.approx(0.5)


def test_the_running_norm_is_part_of_the_saved_state() -> None:
    def steps(stepper: Stepper, parameter: nn.Parameter, gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:
            parameter.grad = gradient.clone()
            stepper.take()

    gradients = [10 ** (2 * torch.rand(())) * torch.randn(32) for _ in range(8)]
    one, other = nn.Parameter(torch.zeros(32)), nn.Parameter(torch.zeros(32))
    whole, first = adam([one], relative_clip=1.0), adam([other], relative_clip=1.0)
    steps(whole, one, gradients)
    steps(first, other, gradients[:4])
    second = adam([other], relative_clip=1.0)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    steps(second, other, gradients[4:])
    assert torch.equal(one, other) and whole.running_norm == second.running_norm


def test_a_gradient_of_zero_takes_no_step() -> None:
    """Otherwise AdamW goes on along its momentum, and decays the weights."""
    parameter = nn.Parameter(torch.randn(16))
    stepper = Stepper(torch.optim.AdamW([parameter], lr=LR, weight_decay=0.1), eps=1e-8)
    parameter.grad = torch.randn(16)
    assert stepper.take().taken
    before, state = parameter.detach().clone(), copy.deepcopy(stepper.optimizer.state_dict())
    for gradient in (torch.zeros(16), None):
        parameter.grad = gradient
        assert not stepper.take().taken
    assert torch.equal(parameter, before) and str(stepper.optimizer.state_dict()) == str(state)


def test_an_update_whose_ratios_are_all_clipped_takes_no_step() -> None:
    engine = adapted_engine()
    parameters = adapter_parameters(engine.model)
    objective = CopoObjective(engine, CopoSettings(clip=1e-12, updates=4, anchors="same"))
    with make_group(engine) as group:
        statistics = objective.update([(group, zscore(torch.randn(GROUP)))], adam(parameters))
    live = [statistics[f"update{update}/live"] for update in range(1, 5)]
    assert statistics["steps"] == sum(share > 0 for share in live) and live[0] == 1


@pytest.mark.parametrize("anchors, updates", [("fresh", 2), ("same", 3), ("split", 2), ("split", 3)])
@pytest.mark.parametrize("steps", ["all", 0.6])
def test_anchors_of_an_iteration(anchors: str, updates: int, steps: Any) -> None:
    engine = adapted_engine()
    settings = CopoSettings(anchors=anchors, updates=updates, steps=steps)
    objective = CopoObjective(engine, settings)
    with make_group(engine) as group:
        items = [objective.draw_items(group, update) for update in range(updates)]
    drawn = [list(dict.fromkeys(part.anchors.tolist())) for part in items]
    assert max(map(len, drawn)) == settings.largest_update
    if anchors == "split":
        together = [anchor for part in drawn for anchor in part]
        assert len(together) == len(set(together)) == 4, "four in all, each in one update"
        assert max(map(len, drawn)) - min(map(len, drawn)) <= 1
    else:
        assert all(len(part) == 4 for part in drawn)
    if anchors == "same":
        assert all(torch.equal(part.steps, items[0].steps) and torch.equal(part.anchors, items[0].anchors) for part in items)
