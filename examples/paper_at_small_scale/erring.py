"""The toy's rewards as a judge would give them that errs: each score is off by a number that is a fixed function of the video.

    export PYTHONPATH=examples/paper_at_small_scale
    python -m arcopo_fast.train toy name=erring train.iterations=150 \
        "rewards={erring:VisualQuality: 2, erring:MotionQuality: 1, erring:TextAlignment: 0.5, toy_vq: 0, toy_mq: 0, toy_ta: 0}"

The same with toy_sde_grpo. Learned rewards err, too, but smoothly: similar videos get similar errors, and an optimizer can follow them.
This error has no slope. The toy's own rewards are exact, so that even the smallest difference has the right sign.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.noise import normal
from arcopo_fast.toy import rewards

ERROR = 0.01
"""Standard deviation of a score's error. A group's rewards differ by 0.11 (first chunk) to 0.01 (last) with AR-CoPO, by 0.02 to 0.006 with
SDE-GRPO and a shared initial noise."""


class _Erring:
    """Scores of `reward`, each with its error."""

    reward: Reward
    name: str
    """Part of the key of its errors."""

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        errors = [normal((1,), self.name, hashlib.blake2b(video.cpu().numpy()).hexdigest()) for video in frames]
        return self.reward(frames, prompts) + ERROR * torch.cat(errors).to(frames.device)


class VisualQuality(_Erring):
    reward, name = rewards.VisualQuality(), "visual_quality"


class MotionQuality(_Erring):
    reward, name = rewards.MotionQuality(), "motion_quality"


class TextAlignment(_Erring):
    reward, name = rewards.TextAlignment(), "text_alignment"
