"""The looks of videos, whatever made them: how much they move, how much detail they have, how different those of one prompt are.

They are measured before and after every run and never trained on: a policy that blurs, freezes or repeats itself to please a judge shows it
here, for generators that have no held-out judge, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

MOTION, DETAIL, DIVERSITY = "motion", "detail", "diversity"
FRAMES, SIDE = 8, 16
"""Frames of a thumbnail, spread evenly over the video, and their height and width."""


class SetMeasure(Protocol):
    """A measure of each video among the others: it describes a video while its frames are there, and compares descriptions at the end."""

    def describe(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [N, D] fp32 on the CPU of frames [N, F, 3, H, W] in [0, 1]."""

    def compare(self, described: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return values [N] by name, of all videos' descriptions [N, D]; the mean over videos is the set's value."""


def motion_and_detail(frames: Tensor) -> dict[str, Tensor]:
    """Return two measures [N] fp32 on the CPU of frames [N, F, 3, H, W] in [0, 1]; one video at a time: at full size each is large.

    motion: the root mean square of the change of luminance from frame to frame; NaN for a single frame.
    detail: the standard deviation of its Laplacian within a frame, mean over frames.
    """
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=frames.device).view(1, 1, 3, 3)
    motion, detail = [], []
    for video in frames:
        luminance = video.float().mean(1)  # [F, H, W]
        motion.append(luminance.diff(dim=0).square().mean().sqrt())
        detail.append(F.conv2d(luminance[:, None], kernel).std((1, 2, 3), correction=0).mean())
    return {MOTION: torch.stack(motion).cpu(), DETAIL: torch.stack(detail).cpu()}


class Diversity:
    """Distance of a video to the prompt's other videos, by small pictures of it."""

    def describe(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return `FRAMES` of each video, `SIDE` pixels high and wide, as rows [N, D]."""
        chosen = torch.linspace(0, frames.shape[1] - 1, FRAMES).round().long()
        return torch.stack([F.adaptive_avg_pool2d(video[chosen].float(), SIDE).flatten() for video in frames]).cpu()

    def compare(self, described: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the mean over the prompt's other videos of the root mean square distance; NaN for the only video of its prompt."""
        small = described.double()
        distances = torch.cdist(small, small) / small.shape[1] ** 0.5
        same_prompt = torch.tensor([[row == column for column in prompts] for row in prompts])
        compared = same_prompt & ~torch.eye(len(prompts), dtype=torch.bool)  # no video with itself
        return {DIVERSITY: ((distances * compared).sum(1) / compared.sum(1)).float()}
