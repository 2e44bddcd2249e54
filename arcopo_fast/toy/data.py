"""The videos of the toy world: one colored shape that moves over a slowly drifting dark background, with its caption.

Everything is rendered from a `torch.Generator`, so a data set is a seed. The videos are flawed on purpose: path and size jitter, outlines
go soft, shapes turn translucent, tints pass over the background. A generator that learns them is mediocre in every video, as real ones are,
and has something to gain from alignment. Background and flaws get fresh randomness at every latent frame: a later chunk of a video is then
never a function of the earlier ones, which a chunk-wise generator needs to stay stochastic, and every chunk has its share in the flaws.
Knows nothing of the VAE, the generator or the rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 64
TEMPORAL_RATIO = 4
"""Pixel frames for each latent frame after the first one, as in the Wan VAE."""

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (0.95, 0.12, 0.12),
    "yellow": (0.95, 0.88, 0.10),
    "green": (0.12, 0.85, 0.15),
    "cyan": (0.10, 0.85, 0.92),
    "blue": (0.15, 0.22, 0.98),
    "purple": (0.90, 0.15, 0.90),
}
MOTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""Unit velocity (x, y) in image coordinates: y points down."""

RADIUS_RANGE = (8.5, 11.0)
SPEED_RANGE = (0.35, 0.7)
"""Pixels a frame."""
EXTENT = {"circle": 1.0, "square": 1.2, "triangle": 1.32, "cross": 1.2}
"""Largest distance from center to outline over the radius, tilt included."""

_MAX_TILT = math.radians(8)
_MARGIN = 4.0  # pixels kept free around the shape; the flaws take most of it
_KEYFRAME_CORRELATION = 0.7  # of the background, from one latent frame to the next
_BRIGHTNESS_GRID, _BRIGHTNESS_DEVIATION = 4, 0.07
_TINT_GRID, _TINT_DEVIATION = 3, 0.025

# The flaws at `flaws=1`; all but the tint are uniform, so that no video is beyond recognition.
_FLAW_CORRELATION = 0.3
_PATH_FLAW = 2.5  # pixels, largest deviation from the constant-velocity path in x and in y
_RADIUS_FLAW = 0.12  # largest relative deviation
_SOFTNESS_FLAW = 5.0  # pixels, largest addition to the one pixel over which an outline is anti-aliased
_OPACITY_FLAW = 0.3  # largest loss of opacity
_TINT_FLAW = 0.04  # standard deviation of the tints over the background


@dataclass(frozen=True)
class Scene:
    """The content of one video.

    Attributes:
        shape, color, motion: named by the caption.
        radius: in pixels.
        start: center (x, y) in the first frame, in pixels.
        speed: in pixels a frame.
        tilt: in radians.
    """

    shape: str
    color: str
    motion: str
    radius: float
    start: tuple[float, float]
    speed: float
    tilt: float

    @property
    def caption(self) -> str:
        """Sentence that describes the scene."""
        return caption_of(self.shape, self.color, self.motion)


def caption_of(shape: str, color: str, motion: str) -> str:
    """Return the sentence for one combination of attributes, such as "a red circle moving left"."""
    return f"a {color} {shape} moving {motion}"


def attributes_of(caption: str) -> tuple[str, str, str]:
    """Return (shape, color, motion) named by a caption; the inverse of `caption_of`. Raise `ValueError` for any other sentence."""
    words = caption.split()
    if len(words) == 5 and words[2] in SHAPES and words[1] in COLORS and words[4] in MOTIONS and words[::3] == ["a", "moving"]:
        return words[2], words[1], words[4]
    raise ValueError(f"not a caption of the toy world: {caption!r}; expected one like 'a red circle moving left'")


def all_captions() -> list[str]:
    """Return every caption, in a fixed order: shape varies slowest, motion fastest."""
    return [caption_of(shape, color, motion) for shape in SHAPES for color in COLORS for motion in MOTIONS]


def pixel_frames(latent_frames: int) -> int:
    """Return the number of pixel frames that `latent_frames` latent frames decode to."""
    return 1 + TEMPORAL_RATIO * (latent_frames - 1)


def sample(
    n: int, latent_frames: int, generator: torch.Generator, *, captions: Sequence[str] | None = None, flaws: float = 1.0
) -> tuple[Tensor, list[str], list[Scene]]:
    """Draw and render `n` videos.

    Args:
        n: number of videos.
        latent_frames: length of each video in latent frames.
        generator: CPU generator; the videos are a pure function of its state.
        captions: what to show, one sentence a video; drawn uniformly by default.
        flaws: how bad the videos are, from 0 (clean) to 1 (as the generator learns them). The random numbers do not depend on it.

    Returns:
        frames [n, 1 + 4 * (latent_frames - 1), 3, 64, 64] fp32 in [0, 1], the captions, and the scenes.

    Raises:
        ValueError: no video of that length fits into the picture, or a caption that the world does not know.
    """
    frame_count = pixel_frames(latent_frames)
    attributes = _draw_attributes(n, generator) if captions is None else [attributes_of(caption) for caption in captions]
    if len(attributes) != n:
        raise ValueError(f"{n} videos need {n} captions, not {len(attributes)}")

    radius = _uniform(n, generator, *RADIUS_RANGE)
    tilt = _uniform(n, generator, -_MAX_TILT, _MAX_TILT)
    reach = radius * torch.tensor([EXTENT[shape] for shape, _, _ in attributes]) + _MARGIN
    room = IMAGE_SIZE - 2 * reach
    fastest = (room / max(frame_count - 1, 1)).clamp(max=SPEED_RANGE[1])
    if (fastest < SPEED_RANGE[0]).any():
        raise ValueError(f"{latent_frames} latent frames are too long for a {IMAGE_SIZE} pixel picture at {SPEED_RANGE[0]} pixels a frame")
    speed = SPEED_RANGE[0] + (fastest - SPEED_RANGE[0]) * torch.rand(n, generator=generator)

    direction = torch.tensor([MOTIONS[motion] for _, _, motion in attributes])  # [n, 2]
    travel = direction * (speed * (frame_count - 1))[:, None]
    low = reach[:, None] - travel.clamp(max=0)
    high = IMAGE_SIZE - reach[:, None] - travel.clamp(min=0)
    start = low + (high - low) * torch.rand(n, 2, generator=generator)

    jitter = flaws * (2 * _wandering((n, 3), latent_frames, generator) - 1)  # [n, F, 3]: x, y and radius
    softness, loss = (flaws * _wandering((n, 2), latent_frames, generator)).unbind(2)  # [n, F]

    time = torch.arange(frame_count, dtype=torch.float32)
    center = start[:, None] + direction[:, None] * (speed[:, None] * time)[..., None] + _PATH_FLAW * jitter[..., :2]
    sizes = radius[:, None] * (1 + _RADIUS_FLAW * jitter[..., 2])
    coverage = _coverage([shape for shape, _, _ in attributes], center, sizes, tilt, 1 + _SOFTNESS_FLAW * softness)

    color = torch.tensor([COLORS[name] for _, name, _ in attributes]) + _uniform(n * 3, generator, -0.05, 0.05).view(n, 3)
    color = color.clamp(0, 1)[:, None, :, None, None]
    background = _background(n, latent_frames, generator, flaws)
    opacity = coverage * (1 - _OPACITY_FLAW * loss)[..., None, None]
    frames = background + opacity[:, :, None] * (color - background)

    scenes = [
        Scene(shape, name, motion, float(radius[i]), (float(start[i, 0]), float(start[i, 1])), float(speed[i]), float(tilt[i]))
        for i, (shape, name, motion) in enumerate(attributes)
    ]
    return frames, [scene.caption for scene in scenes], scenes


def _draw_attributes(n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
    captions = all_captions()
    return [attributes_of(captions[i]) for i in torch.randint(len(captions), (n,), generator=generator).tolist()]


def _uniform(n: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def _wandering(shape: tuple[int, int], latent_frames: int, generator: torch.Generator) -> Tensor:
    """Return a flaw's course over a video, uniform in [0, 1] at every latent frame: [n, F, k]."""
    return torch.special.ndtr(_drifting(shape, latent_frames, generator, _FLAW_CORRELATION))


def _drifting(shape: tuple[int, int], latent_frames: int, generator: torch.Generator, correlation: float) -> Tensor:
    """Return unit-variance values that drift in time: [n, F, k]. A first-order autoregression over latent frames, linear in between."""
    innovation = torch.randn(latent_frames, *shape, generator=generator)
    keyframes = [innovation[0]]
    for noise in innovation[1:]:
        keyframes.append(correlation * keyframes[-1] + math.sqrt(1 - correlation**2) * noise)
    series = torch.stack(keyframes, dim=-1)  # [n, k, L]
    return F.interpolate(series, size=pixel_frames(latent_frames), mode="linear", align_corners=True).transpose(1, 2)


def _background(n: int, latent_frames: int, generator: torch.Generator, flaws: float) -> Tensor:
    """Return a dark, weakly tinted background, smooth in space and time: [n, F, 3, 64, 64]."""
    frame_count = pixel_frames(latent_frames)
    level = _uniform(n, generator, 0.16, 0.32)[:, None, None, None, None]

    def field(grid: int, channels: int, correlation: float) -> Tensor:
        coarse = _drifting((n, channels * grid * grid), latent_frames, generator, correlation)
        coarse = coarse.reshape(n * frame_count, channels, grid, grid)
        fine = F.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=True)
        return fine.view(n, frame_count, channels, IMAGE_SIZE, IMAGE_SIZE)

    brightness = _BRIGHTNESS_DEVIATION * field(_BRIGHTNESS_GRID, 1, _KEYFRAME_CORRELATION)
    tint = _TINT_DEVIATION * field(_TINT_GRID, 3, _KEYFRAME_CORRELATION) + flaws * _TINT_FLAW * field(_TINT_GRID, 3, _FLAW_CORRELATION)
    return (level + brightness + tint).clamp(0.02, 0.6)


def _coverage(shapes: Sequence[str], center: Tensor, radius: Tensor, tilt: Tensor, width: Tensor) -> Tensor:
    """Return the share of each pixel that lies inside the outline: [n, F, 64, 64]. The outline is a ramp `width` pixels wide; 1 is
    anti-aliasing.

    center [n, F, 2], radius [n, F], tilt [n], width [n, F].
    """
    pixel = torch.arange(IMAGE_SIZE, dtype=torch.float32) + 0.5
    dx = pixel[None, None, None, :] - center[..., 0, None, None]  # [n, F, 1, 64]
    dy = pixel[None, None, :, None] - center[..., 1, None, None]  # [n, F, 64, 1]
    cos, sin = tilt.cos()[:, None, None, None], tilt.sin()[:, None, None, None]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    r = radius[..., None, None]
    distance = torch.empty_like(x)
    for shape in SHAPES:
        chosen = [i for i, name in enumerate(shapes) if name == shape]
        if chosen:
            distance[chosen] = outline_distance(shape, x[chosen], y[chosen], r[chosen])
    return (0.5 - distance / width[..., None, None]).clamp(0, 1)


def outline_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return the signed distance to the outline of an upright shape at the origin, negative inside; exact along the edges, not round
    corners.

    The sizes give the four shapes similar areas for one radius.
    """
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    if shape == "triangle":
        return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.66 * radius
    if shape == "cross":
        along, across = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(along - 1.1 * radius, across - 0.38 * radius)
    raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")
