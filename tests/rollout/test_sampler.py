"""The kernels of the sampler against the table of ALGORITHM.md 4, written here in float64 as it stands there."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from arcopo_fast.config.reading import load_config
from arcopo_fast.rollout.sampler import StepRule, Steps, next_input
from arcopo_fast.rollout.scheduler import Schedule

RULES = [StepRule("consistency"), StepRule("ode"), StepRule("dance_sde", 0.3), StepRule("flow_sde", 0.7), StepRule("flow_cps", 0.7)]
RANDOM = [rule for rule in RULES if rule.random]
SHAPE = (2, 3, 4, 5)


def named(rule: StepRule) -> str:
    return rule.kind


class Gaussian(NamedTuple):
    mean: Tensor
    std: float


def table(rule: StepRule, x: Tensor, clean: Tensor, s: float, following: float) -> Gaussian:
    """N(mean, std^2 I) of the next state, row by row of the table; x, clean float64. Not of the last step, which has no noise."""
    v, dt = (x - clean) / s, following - s
    if rule.kind == "ode":
        return Gaussian(x + v * dt, 0.0)
    if rule.kind == "consistency":
        return Gaussian((1 - following) * clean, following)
    if rule.kind == "flow_cps":
        std = following * math.sin(rule.noise * math.pi / 2)
        return Gaussian((1 - following) * clean + math.sqrt(following**2 - std**2) * (x + (1 - s) * v), std)
    g = rule.noise
    if rule.kind == "flow_sde":
        g = rule.noise * math.sqrt(s / (1 - (following if s == 1 else s)))
    return Gaussian(x + (v + g**2 / 2 * (x + (1 - s) * v) / s) * dt, g * math.sqrt(-dt))


def recipe_steps(name: str) -> Steps:
    sampler = load_config(name).sampler
    return Steps.from_schedule(Schedule(sampler.shift), sampler.steps, warp=sampler.warp)


STEPS = {"toy": recipe_steps("toy"), "published": recipe_steps("bench_1_3b")}


def pairs() -> list[tuple[float, float]]:
    """(sigma, next sigma) of the toy's and the published generators' steps but the last, and random ones."""
    known = [(steps.sigmas[step], steps.next_sigma(step)) for steps in STEPS.values() for step in range(len(steps) - 1)]
    drawn = [tuple(pair) for pair in (0.02 + 0.96 * torch.rand(8, 2)).sort(dim=1, descending=True).values.tolist()]
    return [*known, *drawn, (1.0, drawn[0][0])]


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_mean_std_and_log_probability(rule: StepRule) -> None:
    assert {1.0, 0.553372, 0.9375} <= {round(s, 6) for s, _ in pairs()}
    for s, following in pairs():
        x, clean, state = torch.randn(3, *SHAPE, dtype=torch.float64)
        expected, transition = table(rule, x, clean, s, following), rule.transition(s, following)
        assert transition.std == pytest.approx(expected.std, rel=1e-12)
        torch.testing.assert_close(transition.mean(x, clean), expected.mean, rtol=1e-10, atol=1e-10)
        if rule.random:
            log_probability = Normal(transition.mean(x, clean), transition.std).log_prob(state).mean()
            torch.testing.assert_close(log_probability, Normal(expected.mean, expected.std).log_prob(state).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_last_step_is_the_prediction(rule: StepRule) -> None:
    for s in (1.0, 0.625, 0.1):
        x, clean = torch.randn(2, *SHAPE)
        assert rule.transition(s, 0.0).std == 0
        torch.testing.assert_close(next_input(rule, x, clean, s, 0.0, torch.randn(SHAPE)), clean)


def test_cps_with_all_the_noise_is_the_consistency_kernel() -> None:
    x, clean, noise = torch.randn(3, *SHAPE)
    for s, following in [*pairs(), (1.0, 0.0), (0.1, 0.0)]:
        cps, consistency = StepRule("flow_cps", 1.0), StepRule("consistency")
        assert cps.transition(s, following) == consistency.transition(s, following)
        assert torch.equal(next_input(cps, x, clean, s, following, noise), next_input(consistency, x, clean, s, following, noise))


def test_cps_keeps_the_noise_level() -> None:
    """For an exact prediction the next state is (1 - s') x0 plus noise of standard deviation s', however much of it is drawn afresh."""
    clean, noise, fresh = torch.randn(3, 200_000, dtype=torch.float64).unbind()
    for s, following in pairs():
        x = (1 - s) * clean + s * noise
        state = next_input(StepRule("flow_cps", 0.4), x, clean, s, following, fresh)
        assert (state - (1 - following) * clean).std().item() == pytest.approx(following, rel=0.02)  # 12 standard errors


@pytest.mark.parametrize("rule", RANDOM, ids=named)
def test_draws_have_the_stated_mean_and_std(rule: StepRule) -> None:
    count = 10_000
    x, clean = (value.expand(count, *SHAPE) for value in torch.randn(2, *SHAPE))
    for s, following in [pairs()[0], pairs()[5], pairs()[-2]]:
        drawn = next_input(rule, x, clean, s, following, torch.randn(count, *SHAPE)).double()
        expected = table(rule, x[0].double(), clean[0].double(), s, following)
        # 7 standard errors, of 120 elements: a right rule fails less than once in a hundred million runs.
        assert ((drawn.mean(0) - expected.mean) / expected.std).abs().max() < 7 / count**0.5
        assert (drawn.std(0) / expected.std - 1).abs().max() < 7 / (2 * count) ** 0.5


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("name", STEPS)
def test_a_batch_of_transitions_is_each_of_them(rule: StepRule, name: str) -> None:
    steps = STEPS[name]
    index = torch.randint(len(steps), (7,))
    x, clean = torch.randn(2, 7, *SHAPE)
    batch = rule.transitions(steps, index, dim=x.dim())
    mean = batch.mean(x, clean)
    for row, step in enumerate(index.tolist()):
        one = rule.transition(steps.sigmas[step], steps.next_sigma(step))
        assert torch.as_tensor(batch.std)[row].item() == pytest.approx(one.std, rel=1e-6)
        torch.testing.assert_close(mean[row], one.mean(x[row], clean[row]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RANDOM, ids=named)
def test_noise_may_not_be_forgotten(rule: StepRule) -> None:
    with pytest.raises(ValueError, match="needs noise"):
        next_input(rule, torch.randn(SHAPE), torch.randn(SHAPE), 1.0, 0.5, None)
