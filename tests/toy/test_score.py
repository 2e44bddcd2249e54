"""Judging videos with several rewards: every score under its name, and a reward that misbehaves is named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from arcopo_fast.rewards.base import Reward, score


@dataclass
class Fixed(Reward):
    """A reward that returns what it was given."""

    values: Tensor
    scores = ("fixed",)

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return self.values


@pytest.fixture
def frames() -> Tensor:
    return torch.rand(4, 5, 3, 8, 8)


PROMPTS = ["one", "two", "three", "four"]


def test_scores_come_in_order_as_fp32(frames: Tensor) -> None:
    first, second = torch.randn(4), torch.randn(4, dtype=torch.float64)
    components = score({"first": Fixed(first), "second": Fixed(second)}, frames, PROMPTS)
    assert list(components) == ["first", "second"]
    assert torch.equal(components["first"], first) and torch.equal(components["second"], second.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_names_reward_and_video(frames: Tensor, bad: float) -> None:
    scores = torch.rand(4)
    scores[2] = bad
    with pytest.raises(ValueError, match="'second'.*video 2.*'three'"):
        score({"first": Fixed(torch.rand(4)), "second": Fixed(scores)}, frames, PROMPTS)


def test_wrong_shapes_are_refused(frames: Tensor) -> None:
    good = {"good": Fixed(torch.rand(4))}
    with pytest.raises(ValueError, match=r"'bad' returned a Tensor of float32, shape \[4, 1\]"):
        score(good | {"bad": Fixed(torch.rand(4, 1))}, frames, PROMPTS)
    with pytest.raises(ValueError, match="4 prompts, not 3"):
        score(good, frames, PROMPTS[:3])
    with pytest.raises(ValueError, match=r"\[N, F, 3, H, W\]"):
        score(good, frames.transpose(1, 2), PROMPTS)
    with pytest.raises(ValueError, match="fp32"):
        score(good, frames.double(), PROMPTS)
