"""Fixed filters on finished videos: what a reward pays for without any learning.

Whatever a filter earns on the untrained generator's videos says nothing about alignment, and a policy that earns no more may have learned
the filter. Each takes frames [N, F, 3, H, W] in [0, 1] and returns frames of the same shape in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Filter = Callable[[Tensor], Tensor]


def temporal_mean(frames: Tensor, size: int) -> Tensor:
    """Return the mean of `size` frames, an odd number, around each; beyond its ends the video stands still."""
    time = frames.movedim(1, -1).flatten(0, -2)[:, None]  # [., 1, F]
    padded = F.pad(time, (size // 2, size // 2), mode="replicate")
    return F.avg_pool1d(padded, size, stride=1).view(frames.movedim(1, -1).shape).movedim(-1, 1)


def blurred(frames: Tensor) -> Tensor:
    """Return every frame blurred by a binomial kernel of five pixels, a standard deviation of one."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=frames.device) / 16
    images = F.pad(frames.flatten(0, 2)[:, None], (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(images, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1)).view(frames.shape)


def unsharp(frames: Tensor, amount: float) -> Tensor:
    """Return frames with `amount` times the difference to their blurred selves added."""
    return (frames + amount * (frames - blurred(frames))).clamp(0, 1)


def contrast(frames: Tensor, factor: float) -> Tensor:
    """Return frames whose distances from their mean color are multiplied."""
    mean = frames.mean((3, 4), keepdim=True)
    return (mean + factor * (frames - mean)).clamp(0, 1)


def posterized(frames: Tensor, levels: int) -> Tensor:
    """Return frames with so many values a channel."""
    return (frames * (levels - 1)).round() / (levels - 1)


def slower(frames: Tensor) -> Tensor:
    """Return the first half of every video at half its speed, each frame shown twice."""
    return frames[:, torch.arange(frames.shape[1], device=frames.device) // 2]


FILTERS: dict[str, Filter] = {
    "mean of 3 frames": lambda frames: temporal_mean(frames, 3),
    "mean of 7 frames": lambda frames: temporal_mean(frames, 7),
    "mean of 3 frames, sharpened": lambda frames: unsharp(temporal_mean(frames, 3), 3),
    "mean of 7 frames, sharpened, more contrast": lambda frames: contrast(unsharp(temporal_mean(frames, 7), 2), 1.5),
    "sharpened a little": lambda frames: unsharp(frames, 1),
    "sharpened": lambda frames: unsharp(frames, 3),
    "blurred": blurred,
    "brighter": lambda frames: (1.2 * frames).clamp(0, 1),
    "more contrast": lambda frames: contrast(frames, 1.5),
    "4 levels a channel": lambda frames: posterized(frames, 4),
    "half the speed": slower,
    "frozen": lambda frames: frames[:, :1].expand_as(frames),
}
"""The filters by the names that reports give them."""
