"""Three analytic rewards of the toy world, computed from decoded frames: visual quality, motion quality, text alignment.

All three look at the shape through the same soft mask: how far a pixel's chroma goes along the video's dominant chroma. Ratios are
taken throughout, so a change of brightness, contrast or saturation, which scales both sides, earns nothing. Bounded in [0, 1].
Knows nothing of the generator, and shares no formula with the held-out metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from arcopo_fast.rewards.base import Reward
from arcopo_fast.toy import data

_TINY = 1e-4


@dataclass(frozen=True)
class _View:
    """The rewards' view of N videos of F frames."""

    chroma: Tensor  # [N, F, 2, H, W], zero for gray
    luminance: Tensor  # [N, F, H, W]
    dominant: Tensor  # [N, 2], chroma of the most saturated pixels of the whole video
    mask: Tensor  # [N, F, H, W] in [0, 1], 1 inside the shape
    area: Tensor  # [N, F], pixels
    center: Tensor  # [N, F, 2], (x, y) in pixels
    presence: Tensor  # [N, F] in [0, 1]: is there one compact shape of a sensible size


def _look(frames: Tensor) -> _View:
    red, green, blue = frames.unbind(2)
    chroma = torch.stack([red - 0.5 * (green + blue), math.sqrt(0.75) * (green - blue)], dim=2)
    weight = chroma.square().sum(2).square()  # fourth power: dominated by the most saturated pixels, yet smooth
    weight = weight / weight.mean(dim=(1, 2, 3), keepdim=True).clamp_min(_TINY**4)
    dominant = (weight[:, :, None] * chroma).mean(dim=(1, 3, 4)) / weight.mean(dim=(1, 2, 3)).clamp_min(_TINY)[:, None]
    strength = dominant.norm(dim=1).clamp_min(_TINY)
    along = torch.einsum("nfchw,nc->nfhw", chroma, dominant / strength[:, None] ** 2)
    mask = ((along - 0.2) / 0.6).clamp(0, 1)

    height, width = mask.shape[-2:]
    x = torch.arange(width, device=mask.device) + 0.5
    y = torch.arange(height, device=mask.device) + 0.5
    area = mask.sum(dim=(2, 3))
    safe_area = area.clamp_min(1.0)
    columns, rows = mask.sum(2), mask.sum(3)  # [N, F, W], [N, F, H]
    center = torch.stack([columns @ x, rows @ y], dim=-1) / safe_area[..., None]
    spread = (columns @ x.square() + rows @ y.square()) / safe_area - center.square().sum(-1)
    # A disc has area = 2 pi * (sum of its two variances). The ratio is 0.95 for a square, 0.83 for a triangle, near 0 for fragments.
    compactness = area / (2 * math.pi * spread.clamp_min(1.0))
    presence = _ramp(compactness, 0.25, 0.65) * _ramp(area, 40.0, 120.0) * (1 - _ramp(area, 500.0, 1000.0))
    return _View(chroma, frames.mean(2), dominant, mask, area, center, presence)


def _ramp(value: Tensor, low: float, high: float) -> Tensor:
    """Return 0 below `low`, 1 above `high`, smooth in between."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _bell(value: Tensor, width: float) -> Tensor:
    return torch.exp(-((value / width) ** 2))


def _near(value: Tensor, wanted: float | Tensor, width: float) -> Tensor:
    """Return 1 where a positive value is the wanted one; it falls alike on both sides of it, in units of the logarithm."""
    return _bell((value.clamp_min(_TINY) / wanted).log(), width)


def _together(*components: Tensor) -> Tensor:
    """Return the geometric mean of scores in [0, 1]: one bad component spoils the total, but never hides progress in the others."""
    floor = 0.05
    logs = [(floor + (1 - floor) * component).log() for component in components]
    return ((torch.stack(logs).mean(0).exp() - floor) / (1 - floor)).clamp(0, 1)


def _line(track: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a straight line through a track [N, F, k] by least squares; return its slope for each frame [N, k] and the residual [N, F, k]."""
    frame_count = track.shape[1]
    time = torch.arange(frame_count, dtype=track.dtype, device=track.device) - 0.5 * (frame_count - 1)
    centered = track - track.mean(1, keepdim=True)
    slope = torch.einsum("nfk,f->nk", centered, time) / time.square().sum().clamp_min(1.0)
    return slope, centered - slope[:, None] * time[None, :, None]


def _acceleration(track: Tensor) -> Tensor:
    """Return second differences over time of [N, F, ...]; zero where there are fewer than three frames."""
    return track.diff(n=2, dim=1) if track.shape[1] > 2 else torch.zeros_like(track)


# Means over flawless data as the shipped VAE shows them, through which all videos pass: a generator's outlines cannot be sharper than that,
# and a filter that sharpens, smooths or calms more than that is not paid for it.
_OUTLINE_WIDTH = 2.3  # pixels
_UNEVEN = 0.127  # deviation of the chroma inside the shape, relative to the dominant chroma
_STRAY = 0.046  # chroma of the background, relative likewise
_GRAIN = 0.018  # deviation from the neighborhood's mean in the background, relative to that of the luminance
_FLICKER = 0.096  # second differences over time of blocks, relative likewise
_SPEED = 0.5  # pixels a frame
_SATURATION = 0.888  # dominant chroma relative to the named color's


class VisualQuality(Reward):
    """Quality of each frame: one compact shape with a crisp outline, one color inside, and a calm background."""

    scores = ("toy_vq",)

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        view = _look(frames)
        mask, strength = view.mask, view.dominant.norm(dim=1).clamp_min(_TINY)[:, None]
        # Width of the outline in pixels: a ramp of width w over a length of one pixel holds w/6 of m(1-m) and has a total variation of 1.
        variation = (mask.diff(dim=-1).square()[..., :-1, :] + mask.diff(dim=-2).square()[..., :-1]).add(1e-12).sqrt().sum(dim=(2, 3))
        outline_width = 6 * (mask * (1 - mask)).sum(dim=(2, 3)) / variation.clamp_min(1.0)
        crisp = _near(outline_width, _OUTLINE_WIDTH, 0.35)

        inside = mask.square().square()  # the outline hardly counts
        inside = inside / inside.sum(dim=(2, 3), keepdim=True).clamp_min(1.0)
        mean_chroma = (inside[:, :, None] * view.chroma).sum(dim=(3, 4))
        mean_square = (inside * view.chroma.square().sum(2)).sum(dim=(2, 3))
        uneven = (mean_square - mean_chroma.square().sum(2)).clamp_min(0).sqrt() / strength
        uniform = _near(uneven, _UNEVEN, 0.6)

        outside = 1 - F.max_pool2d(mask, 5, stride=1, padding=2)
        outside = outside / outside.sum(dim=(2, 3), keepdim=True).clamp_min(1.0)
        stray = (outside * view.chroma.square().sum(2)).sum(dim=(2, 3)).sqrt() / strength
        grain = (outside * _grain(view.luminance)).sum(dim=(2, 3)).sqrt() / view.luminance.std(dim=(2, 3)).clamp_min(_TINY)
        calm, natural = _near(stray, _STRAY, 1.0), _near(grain, _GRAIN, 0.5)
        return (view.presence * _together(crisp, uniform, calm, natural)).mean(1)


def _grain(luminance: Tensor) -> Tensor:
    """Return the squared deviation of each pixel from the mean of its 3 x 3 neighborhood: [N, F, H, W]."""
    return (luminance - F.avg_pool2d(luminance, 3, stride=1, padding=1, count_include_pad=False)).square()


class MotionQuality(Reward):
    """Quality of the motion: the shape moves as one solid thing, straight, at a constant visible speed, of one size and color, without
    flicker."""

    scores = ("toy_mq",)

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        view = _look(frames)
        strength = view.dominant.norm(dim=1).clamp_min(_TINY)
        velocity, residual = _line(view.center)
        speed = velocity.norm(dim=1)
        straight = _bell(residual.square().sum(2).mean(1).sqrt(), 2.0)
        jerky = _acceleration(view.center).square().sum(2).mean(1).sqrt()
        paced = _near(speed, _SPEED, 0.6)

        log_area = view.area.clamp_min(1.0).log()
        solid = _bell(log_area.std(1, correction=0), 0.25)
        inside = view.mask / view.area.clamp_min(1.0)[..., None, None]
        color = (inside[:, :, None] * view.chroma).sum(dim=(3, 4))
        same_color = _bell(color.var(1, correction=0).sum(1).sqrt() / strength, 0.2)

        blocks = F.avg_pool2d(view.luminance, 8)
        flicker = _acceleration(blocks).square().mean(dim=(1, 2, 3)).sqrt()
        steady = _near(flicker / view.luminance.std(dim=(2, 3)).mean(1).clamp_min(_TINY), _FLICKER, 0.8)
        return view.presence.mean(1) * _together(straight * _bell(jerky, 1.0), paced, solid * same_color, steady)


class TextAlignment(Reward):
    """Agreement with the caption: the video shows the color, the shape and the motion that it names."""

    scores = ("toy_ta",)

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        view = _look(frames)
        attributes = [data.attributes_of(prompt) for prompt in prompts]
        shapes = torch.tensor([data.SHAPES.index(shape) for shape, _, _ in attributes], device=frames.device)
        hues = torch.tensor([_hue(data.COLORS[color]) for _, color, _ in attributes], device=frames.device)
        strengths = torch.tensor([_SATURATION * _strength(data.COLORS[color]) for _, color, _ in attributes], device=frames.device)
        directions = torch.tensor([data.MOTIONS[motion] for _, _, motion in attributes], device=frames.device)

        hue = torch.atan2(view.dominant[:, 1], view.dominant[:, 0])
        color = _bell(torch.remainder(hue - hues + math.pi, 2 * math.pi) - math.pi, math.radians(30))
        color = color * _near(view.dominant.norm(dim=1), strengths, 0.25)

        overlap = _template_overlap(view)  # [N, shapes]
        chosen = overlap.gather(1, shapes[:, None])[:, 0]
        shape = torch.softmax(20 * overlap, dim=1).gather(1, shapes[:, None])[:, 0] * _ramp(chosen, 0.4, 0.85)

        velocity, _ = _line(view.center)
        forward = (velocity * directions).sum(1)
        motion = _ramp(forward, 0.0, 0.3) * (forward / velocity.norm(dim=1).clamp_min(_TINY)).clamp(0, 1).square()
        return view.presence.mean(1) * _together(color, shape, motion)


def _hue(rgb: Sequence[float]) -> float:
    red, green, blue = rgb
    return math.atan2(math.sqrt(0.75) * (green - blue), red - 0.5 * (green + blue))


def _strength(rgb: Sequence[float]) -> float:
    red, green, blue = rgb
    return math.hypot(red - 0.5 * (green + blue), math.sqrt(0.75) * (green - blue))


_GRID = 25
_HALF_WIDTH = 1.2  # of the sampled window, in units of the square root of the shape's area


def _template_overlap(view: _View) -> Tensor:
    """Return the soft intersection over union of the video's average shape, at unit area, with each template: [N, shapes]."""
    n, frame_count, height, width = view.mask.shape
    line = torch.linspace(-_HALF_WIDTH, _HALF_WIDTH, _GRID, device=view.mask.device)
    offset = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)  # [G, G, 2] as (x, y)
    size = view.area.clamp_min(1.0).sqrt()[..., None, None, None]
    position = view.center[:, :, None, None] + size * offset  # pixels, [N, F, G, G, 2]
    position = position / torch.tensor([width, height], device=view.mask.device) * 2 - 1
    window = F.grid_sample(view.mask.flatten(0, 1)[:, None], position.flatten(0, 1), align_corners=False).view(n, frame_count, _GRID, _GRID)
    weight = view.presence + _TINY
    average = (window * weight[..., None, None]).sum(1) / weight.sum(1)[:, None, None]  # [N, G, G]

    templates = _templates().to(view.mask.device)  # [shapes, tilts, G, G]
    intersection = torch.minimum(average[:, None, None], templates).sum(dim=(3, 4))
    union = torch.maximum(average[:, None, None], templates).sum(dim=(3, 4))
    return (intersection / union).amax(2)


def _templates() -> Tensor:
    """Return each shape at unit area and at three tilts, centered on its centroid: [shapes, 3, G, G]."""
    line = torch.linspace(-_HALF_WIDTH, _HALF_WIDTH, _GRID)
    grid_y, grid_x = torch.meshgrid(line, line, indexing="ij")
    softness = 0.08  # about one pixel of a shape of 150 pixels
    templates = []
    for shape in data.SHAPES:
        radius = _UNIT_AREA_RADIUS[shape]
        for degrees in (-6, 0, 6):
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            distance = data.outline_distance(shape, cos * grid_x + sin * grid_y, cos * grid_y - sin * grid_x, torch.tensor(radius))
            templates.append((0.5 - distance / softness).clamp(0, 1))
    return torch.stack(templates).view(len(data.SHAPES), 3, _GRID, _GRID)


_UNIT_AREA_RADIUS = {
    "circle": 1 / math.sqrt(math.pi),
    "square": 1 / 1.7,
    "triangle": 1 / (0.66 * math.sqrt(math.sqrt(27))),
    "cross": 1 / math.sqrt(8 * 1.1 * 0.38 - 4 * 0.38**2),
}
