"""Frames as Qwen2-VL's vision tower takes them: which frames, at which size, cut into which patches. On the device of the frames.

Everything is computed from frames in whole steps of 1/255, as judges saw them in training, so frames sent in a quarter of the bytes get
the same scores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_frames(count: int, fps: float, rate: float = 2.0) -> Tensor:
    """Indices of the frames that stand for a video: `rate` a second, spread evenly, the first and the last among them.

    An even number, at least 4 and at most 768, but no more than there are; one frame is taken twice (VideoAlign vision_process.py,
    smart_nframes and the uniform sampling).

    Args:
        count: frames of the video.
        fps: its frames a second.
    """
    most = min(768, count) // 2 * 2
    number = round(min(max(count / fps * rate, 4), most) / 2) * 2
    return torch.linspace(0, count - 1, max(2, number)).round().long()


def fitting_size(height: int, width: int, *, least: int, most: int, factor: int = 28) -> tuple[int, int]:
    """Sides nearest to a frame's that are multiples of `factor`, with `least` to `most` pixels, and about its proportions.

    (qwen-vl-utils vision_process.py, smart_resize.)
    """
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def quantize(frames: Tensor) -> Tensor:
    """[0, 1] -> whole numbers 0 to 255, in the frames' dtype."""
    return (frames * 255).round().clamp(0, 255)


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames [F, 3, H, W] in whole numbers 0 to 255 -> the same at another size, bicubic with antialiasing."""
    return F.interpolate(frames, size, mode="bicubic", antialias=True).round().clamp(0, 255)


def grayscale(frames: Tensor) -> Tensor:
    """The luminance of frames [F, 3, H, W] in whole numbers 0 to 255, in all three channels, in whole numbers.

    Rounded down, and with weights that sum to 0.9999, as torchvision's rgb_to_grayscale does with bytes, which Astrolabe uses.
    """
    weights = frames.new_tensor([0.2989, 0.587, 0.114])
    return (frames * weights[:, None, None]).sum(1, keepdim=True).floor().expand_as(frames)


class Patches(NamedTuple):
    """The way a Qwen2-VL cuts frames into patches. mean, std: of each color, for values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int = 14
    temporal: int = 2
    merge: int = 2

    @property
    def factor(self) -> int:
        """The number that a frame's sides must be multiples of."""
        return self.patch * self.merge

    def features(self, grid: tuple[int, int, int]) -> int:
        """Features that the vision tower makes of a grid of patches, after merging."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def cut(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Frames [F, 3, H, W] in whole numbers 0 to 255 -> patches [t h w, 3 temporal patch patch] and their grid (t, h, w).

        One patch spans `temporal` frames; the last frame is repeated where they do not come out even, so an image stands for two.
        Patches that will be merged are neighbors in the order.
        """
        missing = -len(frames) % self.temporal
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        mean, std = (frames.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        frames = (frames / 255 - mean) / std
        grid = (len(frames) // self.temporal, frames.shape[2] // self.patch, frames.shape[3] // self.patch)
        merged = [part for side in grid[1:] for part in (side // self.merge, self.merge, self.patch)]
        blocks = frames.reshape(grid[0], self.temporal, frames.shape[1], *merged)
        # t, temporal, color, (h, merge, patch), (w, merge, patch) -> t, h, w, merge, merge, color, temporal, patch, patch
        blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return blocks.reshape(math.prod(grid), -1), grid
