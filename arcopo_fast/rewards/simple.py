"""Two rewards that any frames can be scored with, whatever made them: no model, no checkpoint, no world of their own.

For untrained generators and for trying out a set-up. Both are ratios, so brightness and contrast earn nothing, and both lie in [0, 1] by
construction. One video is looked at at a time: at full size its frames are hundreds of megabytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arcopo_fast.rewards.base import Reward

_TINY = 1e-8
"""Below this sum of squares a video is constant: it has no ratio, and no contrast that float32 could tell from rounding."""


class Sharpness(Reward):
    """The share of contrast that lies between neighboring pixels: sqrt((sum dx^2 + sum dy^2) / (8 sum (l - mean)^2)), mean over frames.

    l is the luminance of a frame, dx and dy its differences along rows and columns. Each of their two sums is at most four times the
    last one. White noise scores 0.71, a smooth gradient nearly 0, a constant frame 0.
    """

    scores = ("sharpness",)

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return torch.stack([self._score(video.mean(1)) for video in frames])

    def _score(self, luminance: Tensor) -> Tensor:
        contrast = (luminance - luminance.mean((1, 2), keepdim=True)).square().sum((1, 2))
        between = luminance.diff(dim=1).square().sum((1, 2)) + luminance.diff(dim=2).square().sum((1, 2))
        return (between / (8 * contrast).clamp_min(_TINY)).clamp_max(1).sqrt().mean()


class Steadiness(Reward):
    """The evenness with which pixels change: 1 - sqrt(sum d^2 / (16 sum (l - mean)^2)).

    d is the second difference of the luminance over time, the mean each pixel's own over time. sum d^2 is at most 16 times the other sum.
    Flicker from frame to frame scores 0, white noise 0.39, slow change nearly 1, a still video 1.
    """

    scores = ("steadiness",)

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return torch.stack([self._score(video.mean(1)) for video in frames])

    def _score(self, luminance: Tensor) -> Tensor:
        change = (luminance - luminance.mean(0)).square().sum()
        uneven = luminance.diff(n=2, dim=0).square().sum() if len(luminance) > 2 else change.new_zeros(())
        return 1 - (uneven / (16 * change).clamp_min(_TINY)).clamp_max(1).sqrt()
