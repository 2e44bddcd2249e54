"""How much videos move, how much detail they have, and how different those of a prompt are."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from arcopo_fast.evaluation.filters import blurred, slower
from arcopo_fast.evaluation.looks import DETAIL, DIVERSITY, FRAMES, MOTION, Diversity, motion_and_detail


def stripes(speed: float, phase: float = 0.0, frames: int = 24) -> Tensor:
    """A video [1, F, 3, 32, 32] of stripes that move by so many pixels a frame."""
    place = torch.arange(32.0)[None] - speed * torch.arange(float(frames))[:, None]
    wave = 0.5 + 0.4 * torch.sin(place * math.pi / 8 + phase)
    return wave[None, :, None, None, :].expand(1, frames, 3, 32, 32)


def test_motion_and_detail_are_what_they_say() -> None:
    frames = torch.rand(2, 5, 3, 9, 7)
    luminance = frames[1].mean(1).double().numpy()
    motion = np.sqrt(np.mean((luminance[1:] - luminance[:-1]) ** 2))
    inner = luminance[:, 1:-1, 1:-1]
    laplacian = luminance[:, 2:, 1:-1] + luminance[:, :-2, 1:-1] + luminance[:, 1:-1, 2:] + luminance[:, 1:-1, :-2] - 4 * inner
    found = motion_and_detail(frames)
    np.testing.assert_allclose(found[MOTION][1].item(), motion, rtol=1e-5)
    np.testing.assert_allclose(found[DETAIL][1].item(), laplacian.std((1, 2)).mean(), rtol=1e-5)
    assert motion_and_detail(frames[:, :1])[MOTION].isnan().all(), "one frame does not move"


def test_slower_videos_move_less_and_blurred_ones_have_less_detail() -> None:
    quick, slow, still = (motion_and_detail(stripes(speed))[MOTION].item() for speed in (2.0, 1.0, 0.0))
    assert quick > 1.5 * slow > 0 == still
    frames = stripes(1.0) + 0.05 * torch.randn(1, 24, 3, 32, 32)
    assert motion_and_detail(blurred(frames))[DETAIL] < 0.7 * motion_and_detail(frames)[DETAIL]
    assert motion_and_detail(slower(stripes(1.0)))[MOTION] < 0.8 * slow


def test_diversity_is_that_of_the_videos_of_a_prompt() -> None:
    videos = torch.cat([stripes(1.0, phase) for phase in (0.0, 0.5, 3.0, 0.0)])
    small = Diversity().describe(videos, ["a", "a", "a", "b"])
    assert small.shape == (4, FRAMES * 3 * 16 * 16)
    found = Diversity().compare(small, ["a", "a", "a", "b"])[DIVERSITY]
    distances = [(small[0] - small[other]).square().mean().sqrt() for other in (1, 2)]
    torch.testing.assert_close(found[0], torch.stack(distances).mean())
    assert found[2] > found[0] and found[3].isnan(), "b has one video"
    assert not Diversity().compare(small[[0, 3]], ["a", "a"])[DIVERSITY].any(), "the same video twice"
