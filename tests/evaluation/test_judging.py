"""The one loop that decodes and scores: slice by slice, what a video and its score are does not depend on the slices."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from arcopo_fast.evaluation.judging import Evaluation, Judging, joined
from arcopo_fast.model.vae import VAECache
from arcopo_fast.rewards.base import Reward

VIDEOS, PREFIX, TAIL = 5, 2, 3


class Doubling:
    """In the place of a VAE: a frame is twice its latent plus the sum of all latents before it."""

    vae = None

    def start(self) -> VAECache:
        return VAECache({}, 0)

    def decode(self, latents: Tensor, cache: VAECache) -> tuple[Tensor, VAECache]:
        before: Tensor = dict(cache.features).get(self, torch.zeros_like(latents[:, :1]))  # type: ignore[call-overload]
        sums = before + latents.cumsum(1) - latents
        return 2 * latents + sums, VAECache({self: before + latents.sum(1, keepdim=True)}, cache.frames + latents.shape[1])  # type: ignore[dict-item]


class Brightness(Reward):
    """A video's mean plus the number in its prompt; fails for prompts without one."""

    scores = ("bright",)

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        self.seen.append(len(frames))
        return torch.tensor([video.mean().item() + float(prompt) for video, prompt in zip(frames, prompts, strict=True)])


@pytest.mark.parametrize("at_once", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("prefix", [False, True])
def test_each_video_is_decoded_and_scored_once_with_its_own_prompt(prefix: bool, at_once: int | None) -> None:
    latents, shared = torch.rand(VIDEOS, TAIL, 3, 2, 2), torch.rand(1, PREFIX, 3, 2, 2)
    whole = torch.cat([shared.expand(VIDEOS, -1, -1, -1, -1), latents], dim=1) if prefix else latents
    expected = 2 * whole + whole.cumsum(1) - whole
    prompts, reward = [str(number) for number in range(VIDEOS)], Brightness()
    judging = Judging(Doubling(), at_once)  # type: ignore[arg-type]
    slices = judging.decode(latents, shared if prefix else None)
    parts = list(judging.judge({"bright": reward}, slices, prompts))
    size = min(at_once or VIDEOS, VIDEOS)
    assert reward.seen == [len(frames) for frames, _ in parts] == [min(size, VIDEOS - first) for first in range(0, VIDEOS, size)]
    torch.testing.assert_close(torch.cat([frames for frames, _ in parts]), expected)
    scores = joined([scores for _, scores in parts])["bright"]
    torch.testing.assert_close(scores, expected.flatten(1).mean(1) + torch.arange(VIDEOS))
    assert scores.dtype == torch.float32


def test_without_a_device_nothing_is_moved() -> None:
    assert isinstance(Judging(Doubling()).at_work(object()), nullcontext)  # type: ignore[arg-type]


def test_a_summary_leaves_out_and_counts_what_failed() -> None:
    values = torch.tensor([0.5, math.nan, 2.0, 1.0])
    summary = Evaluation({"some": values, "none": torch.full((2,), math.nan)}, [], values).summary()
    assert summary["some"]["failed"] == 1 and summary["some"]["values"] == [0.5, None, 2.0, 1.0]
    assert (summary["some"]["mean"], summary["some"]["std"]) == pytest.approx((3.5 / 3, torch.tensor([0.5, 2, 1]).std(correction=0).item()))
    assert summary["none"] == {"mean": None, "std": None, "values": [None, None], "failed": 2}
