"""The judges of the toy world that wrote tests/fixtures/old; others have taken their places since."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arcopo_fast.build import checkpoint_path
from arcopo_fast.rewards.base import Reward
from arcopo_fast.toy import metrics
from arcopo_fast.toy.rewards import _TINY, VisualQuality, _bell, _grain, _look, _together


def visual_quality(frames: Tensor) -> Tensor:
    """Return toy_vq as it was, [N]: outlines could not be too sharp, nor backgrounds too calm."""
    view = _look(frames)
    mask, strength = view.mask, view.dominant.norm(dim=1).clamp_min(_TINY)[:, None]
    variation = (mask.diff(dim=-1).square()[..., :-1, :] + mask.diff(dim=-2).square()[..., :-1]).add(1e-12).sqrt().sum(dim=(2, 3))
    crisp = _bell((6 * (mask * (1 - mask)).sum(dim=(2, 3)) / variation.clamp_min(1.0) - 1.0).clamp_min(0), 1.5)
    inside = mask.square().square()
    inside = inside / inside.sum(dim=(2, 3), keepdim=True).clamp_min(1.0)
    mean_chroma = (inside[:, :, None] * view.chroma).sum(dim=(3, 4))
    mean_square = (inside * view.chroma.square().sum(2)).sum(dim=(2, 3))
    uniform = _bell((mean_square - mean_chroma.square().sum(2)).clamp_min(0).sqrt() / strength, 0.25)
    outside = 1 - F.max_pool2d(mask, 5, stride=1, padding=2)
    outside = outside / outside.sum(dim=(2, 3), keepdim=True).clamp_min(1.0)
    stray = (outside * view.chroma.square().sum(2)).sum(dim=(2, 3)).sqrt() / strength
    grain = (outside * _grain(view.luminance)).sum(dim=(2, 3)).sqrt() / view.luminance.std(dim=(2, 3)).clamp_min(_TINY)
    return (view.presence * _together(crisp, uniform, _bell(stray, 0.35) * _bell(grain, 0.3))).mean(1)


class TemporalCoherence(Reward):
    """Share of each frame's variance that blocks of the frame before, moved by at most one pixel, explain; mean over frames."""

    scores = ("temporal_coherence",)

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        before, after = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)
        height, width = before.shape[-2:]
        padded = F.pad(before, (1, 1, 1, 1), mode="replicate")
        residual = torch.full((len(after), height // 8, width // 8), torch.inf, device=frames.device)
        for row, column in itertools.product(range(3), repeat=2):
            error = (padded[:, :, row : row + height, column : column + width] - after).square().sum(1)
            residual = torch.minimum(residual, F.avg_pool2d(error[:, None], 8)[:, 0])
        spread = after.var(dim=(2, 3), correction=0).sum(1)
        return (1 - residual.mean(dim=(1, 2)) / spread.clamp_min(1e-4)).clamp(0, 1).view(len(frames), -1).mean(1)


def put_in_place(monkeypatch: pytest.MonkeyPatch, inputs: Path) -> None:
    """Let the toy's judges be those of then, with the digests that `inputs`, a run's inputs.json, has of them."""
    digests = json.loads(inputs.read_text())["judges"]
    classifier = metrics.CaptionClassifier.from_pretrained(checkpoint_path("toy") / "classifier")
    held_out = (metrics.ShapeFidelity(), TemporalCoherence(), metrics.CaptionAccuracy(classifier))
    monkeypatch.setattr(Reward, "fingerprint", lambda self, name: digests[name])
    monkeypatch.setattr(VisualQuality, "__call__", lambda self, frames, prompts: visual_quality(frames))
    monkeypatch.setattr(metrics, "held_out", lambda directory: {name: judge for judge in held_out for name in judge.scores})
