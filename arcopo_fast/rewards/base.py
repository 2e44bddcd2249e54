"""What a reward is, and how several of them judge the same videos.

Knows nothing of how the videos were made, nor of weights and advantages.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Reward(Protocol):
    """Judges videos. Deterministic, and each video's score depends on that video and its prompt alone."""

    name: str

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        """Score videos: frames [N, F, 3, H, W] fp32 in [0, 1] and one prompt for each -> [N] fp32, higher is better.

        A video that cannot be scored gets NaN.
        """
        ...


@torch.no_grad()
def score(rewards: Mapping[str, Reward], frames: Tensor, prompts: list[str], *, quarantine: bool = False) -> dict[str, Tensor]:
    """Every reward's scores [N] fp32, under its key, in order.

    Args:
        rewards: by the name under which the scores are logged.
        frames: [N, F, 3, H, W] fp32 in [0, 1].
        prompts: N sentences.
        quarantine: a score that is not finite becomes NaN, with a warning, instead of an error. Whoever averages must leave NaN out.

    Raises:
        ValueError: wrong shapes or dtype, or a score that is not finite; the message names the reward and the video.
    """
    if frames.dim() != 5 or frames.shape[2] != 3 or frames.dtype != torch.float32:
        raise ValueError(f"rewards judge fp32 frames [N, F, 3, H, W], not {frames.dtype} {list(frames.shape)}")
    if len(prompts) != len(frames):
        raise ValueError(f"{len(frames)} videos need {len(frames)} prompts, not {len(prompts)}")

    components: dict[str, Tensor] = {}
    for name, reward in rewards.items():
        scores = reward(frames, prompts).float()
        if scores.shape != (len(frames),):
            raise ValueError(f"reward {name!r} returned shape {list(scores.shape)}; expected [{len(frames)}], one score a video")
        finite = scores.isfinite()
        if not finite.all():
            if not quarantine:
                video = int((~finite).nonzero()[0])
                raise ValueError(f"reward {name!r} returned {float(scores[video])} for video {video} ({prompts[video]!r})")
            # The same text every time: Python shows it once.
            warnings.warn(f"reward {name!r} returned scores that are not finite; they are left out, and counted", stacklevel=3)
            scores = scores.where(finite, torch.nan)
        components[name] = scores
    return components
