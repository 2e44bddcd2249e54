"""Fixed filters on videos, against their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from arcopo_fast.evaluation.filters import FILTERS, blurred, contrast, posterized, slower, temporal_mean, unsharp


def videos() -> Tensor:
    return torch.rand(2, 6, 3, 9, 7)


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_keeps_the_shape_and_the_range_and_changes_something(name: str) -> None:
    frames = videos()
    kept = frames.clone()
    found = FILTERS[name](frames)
    assert found.shape == frames.shape and found.min() >= 0 and found.max() <= 1
    assert torch.equal(frames, kept), "the videos themselves are judged, too"
    assert (found - frames).abs().max() > 0.05


@pytest.mark.parametrize("size", [3, 5, 7])
def test_temporal_mean(size: int) -> None:
    frames, half = videos(), size // 2
    expected = torch.stack([frames[:, [min(max(at + step, 0), 5) for step in range(-half, half + 1)]].mean(1) for at in range(6)], dim=1)
    torch.testing.assert_close(temporal_mean(frames, size), expected)


def test_blurred() -> None:
    frames = videos()
    image, kernel = frames[1, 3, 2].double().numpy(), np.outer(*[np.array([1, 4, 6, 4, 1]) / 16] * 2)
    padded = np.pad(image, 2, mode="edge")
    expected = [[(padded[row : row + 5, column : column + 5] * kernel).sum() for column in range(7)] for row in range(9)]
    np.testing.assert_allclose(blurred(frames)[1, 3, 2].numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(unsharp(frames, 0.5), (1.5 * frames - 0.5 * blurred(frames)).clamp(0, 1))


def test_the_others() -> None:
    frames = videos()
    assert set(posterized(frames, 4).unique().mul(3).round().tolist()) <= {0, 1, 2, 3}
    assert torch.equal(slower(frames), frames[:, [0, 0, 1, 1, 2, 2]])
    mild = 0.25 + 0.5 * frames
    stretched = contrast(mild, 1.5)
    torch.testing.assert_close(stretched.mean((3, 4)), mild.mean((3, 4)))
    torch.testing.assert_close(stretched.std((3, 4)), 1.5 * mild.std((3, 4)))
    assert torch.equal(FILTERS["frozen"](frames)[:, 4], frames[:, 0])
