"""Advantages: their defining properties, on fresh random rewards."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from arcopo_fast.objectives.advantage import group_advantages, quasi_norm, window_advantages, zscore


def test_zscore_has_mean_zero_and_unit_spread() -> None:
    rewards = torch.randn(12) * 3 + 5
    advantages = zscore(rewards)
    assert advantages.sum().abs() < 1e-12 and advantages.square().mean() == pytest.approx(1)
    assert torch.equal(advantages.argsort(), rewards.argsort())
    torch.testing.assert_close(zscore(rewards * 7 - 2), advantages, rtol=0, atol=1e-5)


def test_a_floor_quietens_groups_of_equals_only() -> None:
    rewards = torch.randn(12)
    rewards = (rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(zscore(0.01 * rewards, 0.1), 0.1 * rewards.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(zscore(0.5 * rewards, 0.1), zscore(0.5 * rewards), rtol=0, atol=1e-12)


def test_the_samples_spread_is_larger_by_what_it_is_divided_by() -> None:
    rewards = {"a": torch.randn(12), "b": torch.randn(12)}
    for combine in ("sum", "per_reward_zscore"):
        population = group_advantages(rewards, {"a": 1.0, "b": 1.0}, combine=combine)
        sample = group_advantages(rewards, {"a": 1.0, "b": 1.0}, combine=combine, std="sample")
        torch.testing.assert_close(sample, population * (11 / 12) ** 0.5)
    torch.testing.assert_close(zscore(rewards["a"], std="sample").std(correction=1).item(), 1.0)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6])
def test_a_group_without_variance_teaches_nothing(value: float) -> None:
    assert not zscore(torch.full((12,), value)).any()
    assert not group_advantages({"a": torch.full((12,), value)}, {"a": 2.0}, kind="quasi_norm").any()


def test_quasi_norm_is_the_papers() -> None:
    advantages, p = zscore(torch.randn(9)), 0.8
    normed = quasi_norm(advantages, p)
    assert normed.abs().pow(p).sum().pow(1 / p).item() == pytest.approx(9**0.5)
    torch.testing.assert_close(normed / normed.norm(), advantages / advantages.norm())


def test_per_reward_zscores_ignore_a_rewards_scale_but_not_its_weight() -> None:
    a, b = torch.randn(12), torch.randn(12)
    weights = {"a": 1.0, "b": 0.5}
    balanced = group_advantages({"a": a, "b": b}, weights, combine="per_reward_zscore")
    scaled = group_advantages({"a": a, "b": 100 * b}, weights, combine="per_reward_zscore")
    torch.testing.assert_close(balanced, scaled, rtol=0, atol=1e-5)
    summed = group_advantages({"a": a, "b": 100 * b}, weights)
    assert torch.corrcoef(torch.stack([summed, b.double()]))[0, 1] > 0.99, "summed first, the larger reward decides"
    torch.testing.assert_close(group_advantages({"a": a, "b": b}, weights), zscore(a.double() + 0.5 * b.double()))


@pytest.mark.parametrize("combine", ["sum", "per_reward_zscore"])
@pytest.mark.parametrize("kind", ["zscore", "quasi_norm"])
def test_a_member_without_a_score_takes_no_part(
    combine: Literal["sum", "per_reward_zscore"], kind: Literal["zscore", "quasi_norm"]
) -> None:
    a, b, watched = torch.randn(3, 12)
    weights, failed = {"a": 1.0, "b": 0.5, "watched": 0.0}, torch.tensor([2, 7])
    components = {"a": a, "b": b.index_fill(0, failed, torch.nan), "watched": watched.index_fill(0, torch.tensor([0, 2]), torch.nan)}
    advantages = window_advantages(components, [(1.0, weights)], combine=combine, kind=kind, largest=1.5)
    others = torch.ones(12, dtype=torch.bool).index_fill(0, failed, False)
    alone = {name: values[others] for name, values in {"a": a, "b": b}.items()}
    assert torch.equal(advantages[others], window_advantages(alone, [(1.0, weights)], combine=combine, kind=kind, largest=1.5))
    assert not advantages[failed].any() and advantages[others].all()


@pytest.mark.parametrize("scored", [0, 1])
def test_a_group_with_less_than_two_scores_teaches_nothing(scored: int) -> None:
    rewards = torch.full((6,), torch.nan)
    rewards[:scored] = torch.randn(scored)
    assert torch.equal(group_advantages({"a": rewards}, {"a": 1.0}), torch.zeros(6, dtype=torch.float64))


def test_two_equal_windows_of_half_a_weight_are_one() -> None:
    rewards = {"a": torch.randn(8), "b": torch.randn(8)}
    weights = {"a": 1.0, "b": -0.5}
    single = window_advantages(rewards, [(1.0, weights)], largest=1.2)
    assert torch.equal(single, group_advantages(rewards, weights).clamp(-1.2, 1.2))
    twice = {f"{window}/{name}": scores for window in "uv" for name, scores in rewards.items()}
    halves = [(0.5, {f"{window}/{name}": weight for name, weight in weights.items()}) for window in "uv"]
    torch.testing.assert_close(window_advantages(twice, halves, largest=1.2), single, rtol=0, atol=1e-12)
    watched = [(1.0, {"u/a": 1.0, "u/b": 0.0}), (0.0, {"v/a": 1.0}), (3.0, {"v/b": 0.0})]
    assert torch.equal(window_advantages(twice, watched), zscore(rewards["a"])), "no weight, no part in it"


def test_a_member_without_a_score_in_one_window_keeps_the_others_advantage() -> None:
    near, far = torch.randn(2, 6)
    rewards = {"near/a": near.index_fill(0, torch.tensor([2]), torch.nan), "far/a": far}
    advantages = window_advantages(rewards, [(1.0, {"near/a": 1.0}), (0.5, {"far/a": 1.0})])
    others = torch.arange(6) != 2
    torch.testing.assert_close(advantages, 0.5 * zscore(far) + torch.zeros(6).double().masked_scatter(others, zscore(near[others])))


@pytest.mark.parametrize("correlation", [0.0, 1.0])
def test_windows_add_up_as_correlated_scores_do(correlation: float) -> None:
    first = zscore(torch.randn(12))
    other = zscore(torch.randn(12))
    other = zscore(other - (first * other).mean() * first)  # uncorrelated
    rewards = {"u/a": first, "v/a": correlation * first + (1 - correlation**2) ** 0.5 * other}
    advantages = window_advantages(rewards, [(1.0, {"u/a": 1.0}), (0.5, {"v/a": 1.0})])
    assert advantages.std(correction=0).item() == pytest.approx((1 + 0.25 + correlation) ** 0.5, abs=1e-5)


def test_an_anchor_is_the_baseline_as_in_kvpo() -> None:
    rewards = {"local/a": torch.tensor([1.0, 2, 3, 4]), "global/a": torch.tensor([0.3, 0.1, 0.2, 0.6])}
    anchor, settings = {"local/a": 2.0, "global/a": 0.2}, {"combine": "per_reward_zscore", "std": "sample"}
    near, far = ({name: 1.0} for name in rewards)
    local = zscore(rewards["local/a"], std="sample", anchor=2.0)
    torch.testing.assert_close(local, torch.tensor([-0.8771, 0, 0.8771, 1.7541]).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        zscore(rewards["global/a"], std="sample", anchor=0.2), torch.tensor([0.5199, -0.5199, 0, 2.0795]).double(), rtol=0, atol=1e-4
    )
    for largest, last in ((None, 2.8579), (2.5, 2.5)):
        fused = window_advantages(rewards, [(1.0, near), (0.5, far)], anchor=anchor, largest=largest, **settings)
        torch.testing.assert_close(fused, torch.tensor([-0.6272, -0.2673, 0.8944, last]).double(), rtol=0, atol=1e-4)
    for unscored in ({"local/a": torch.nan}, {"local/a": 2.0}):
        alone = window_advantages({"local/a": torch.tensor([2.0, 2, 2])}, [(1.0, near)], anchor=unscored)
        assert not alone.any(), "nothing to compare with, or members that are all the same"


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
@pytest.mark.parametrize("combine", ["sum", "per_reward_zscore"])
def test_rewards_of_any_size_teach_the_same(exponent: int, combine: Literal["sum", "per_reward_zscore"]) -> None:
    """What is no variance is relative to the rewards: to float32's rounding of them."""
    rewards, scale = torch.randn(8), 10.0**exponent
    torch.testing.assert_close(zscore(rewards * scale), zscore(rewards), rtol=0, atol=1e-5)
    advantages = group_advantages({"a": rewards * scale}, {"a": 2.0}, combine=combine)
    torch.testing.assert_close(advantages, group_advantages({"a": rewards}, {"a": 2.0}, combine=combine), rtol=0, atol=1e-5)
    base = torch.full((8,), 3.7) * scale
    jitter = torch.cat([base[:5], base[5:].nextafter(2 * base[5:])])
    assert jitter.unique().numel() == 2 and not zscore(jitter).any()
    assert not group_advantages({"a": jitter, "b": base}, {"a": 1.0, "b": -1.0}, combine=combine).any(), "a difference of two large ones"
    assert zscore(torch.cat([base[:5], base[5:] * (1 + 1e-5)])).all()


@pytest.mark.parametrize("combine", ["sum", "per_reward_zscore"])
def test_a_large_constant_hides_no_small_reward(combine: Literal["sum", "per_reward_zscore"]) -> None:
    small, constant = torch.randn(8) * 1e-4, torch.full((8,), 1e6)
    advantages = group_advantages({"a": small, "b": constant}, {"a": 1.0, "b": 1.0}, combine=combine)
    torch.testing.assert_close(advantages, zscore(small), rtol=0, atol=1e-4)
