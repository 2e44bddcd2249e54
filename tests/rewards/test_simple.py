"""Rewards of any frames: bounds, known values, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from support.rewards import load_reward
from torch import Tensor

from arcopo_fast.rewards.base import Reward, score
from arcopo_fast.rewards.simple import Sharpness, Steadiness

KINDS: list[Reward] = [Sharpness(), Steadiness()]


def videos(count: int = 3, frames: int = 6, height: int = 18, width: int = 26) -> Tensor:
    """From smooth to noise."""
    smooth = torch.nn.functional.interpolate(torch.rand(count, 3, 3, 4, 5), size=(frames, height, width), mode="trilinear").transpose(1, 2)
    share = torch.rand(count, 1, 1, 1, 1)
    return (share * smooth + (1 - share) * torch.rand(count, frames, 3, height, width)).contiguous()


def judge(reward: Reward, frames: Tensor) -> Tensor:
    return score({"it": reward}, frames, ["a prompt"] * len(frames))["it"]


@pytest.mark.parametrize("reward", KINDS, ids=lambda reward: reward.scores[0])
def test_brightness_contrast_and_company_do_not_matter(reward: Reward) -> None:
    frames = videos()
    scores = judge(reward, frames)
    assert scores.shape == (3,) and scores.max() - scores.min() > 1e-4, "different videos, different scores"
    torch.testing.assert_close(judge(reward, 0.3 * frames + 0.5), scores, rtol=0, atol=2e-5)
    for index in range(len(frames)):
        assert judge(reward, frames[index : index + 1]) == scores[index]


@pytest.mark.parametrize("reward", KINDS, ids=lambda reward: reward.scores[0])
def test_bounds_hold_for_any_frames(reward: Reward) -> None:
    still, one, two = videos(frames=1).expand(-1, 4, -1, -1, -1), videos(frames=1), videos(frames=2)
    steps = torch.rand(3, 5, 3, 9, 7).round()
    for frames in (videos(), still.contiguous(), one, two, steps, torch.zeros(2, 4, 3, 5, 5), torch.full((2, 4, 3, 5, 5), 0.7)):
        scores = judge(reward, frames)
        assert scores.isfinite().all() and (scores >= 0).all() and (scores <= 1).all()


def test_sharpness_from_constant_to_checkerboard() -> None:
    row, column = torch.arange(20)[:, None], torch.arange(30)
    board = ((row + column) % 2).float().expand(1, 2, 3, 20, 30)
    ramp = (column / 30.0).expand(1, 2, 3, 20, 30)
    noise = torch.rand(1, 4, 3, 64, 64)
    assert judge(Sharpness(), torch.full((1, 2, 3, 20, 30), 0.4)) == 0
    assert judge(Sharpness(), ramp.contiguous()) < 0.1
    torch.testing.assert_close(judge(Sharpness(), noise), torch.tensor([0.5**0.5]), rtol=0, atol=0.02)
    assert judge(Sharpness(), board.contiguous()) > 0.97
    blurred = torch.nn.functional.avg_pool2d(noise.flatten(0, 1), 3, 1, 1).view_as(noise)
    assert judge(Sharpness(), blurred) < judge(Sharpness(), noise)


def test_steadiness_from_flicker_to_stillness() -> None:
    still = videos(frames=1).expand(-1, 5, -1, -1, -1).contiguous()
    flicker = torch.rand(1, 1, 3, 8, 8) * 0.4 + 0.5 * (torch.arange(60) % 2).view(1, 60, 1, 1, 1)
    even = torch.rand(1, 1, 3, 8, 8) * 0.4 + torch.linspace(0, 0.5, 12).view(1, 12, 1, 1, 1)
    assert (judge(Steadiness(), still) == 1).all()
    assert judge(Steadiness(), flicker) < 0.03
    assert judge(Steadiness(), even) > 0.999
    torch.testing.assert_close(judge(Steadiness(), torch.rand(1, 200, 3, 16, 16)), torch.tensor([1 - (6 / 16) ** 0.5]), rtol=0, atol=0.01)


def test_recipes_can_name_them() -> None:
    for reward in KINDS:
        assert load_reward(reward.scores[0]).scores == reward.scores
