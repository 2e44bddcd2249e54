"""Rewards by the name that a recipe gives them: those of the package, and a user's own by import path.

The package's are paths too, and imported when they are asked for: a process that serves one reward needs what that reward needs, no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.custom import OwnReward, find, load_own

REWARDS = {
    "toy_vq": "arcopo_fast.toy.rewards:VisualQuality",
    "toy_mq": "arcopo_fast.toy.rewards:MotionQuality",
    "toy_ta": "arcopo_fast.toy.rewards:TextAlignment",
    "sharpness": "arcopo_fast.rewards.simple:Sharpness",
    "steadiness": "arcopo_fast.rewards.simple:Steadiness",
    "clip": "arcopo_fast.rewards.clip:CLIPScore",
    "videoalign_vq": "arcopo_fast.rewards.videoalign:VisualQuality",
    "videoalign_mq": "arcopo_fast.rewards.videoalign:MotionQuality",
    "videoalign_mq_grey": "arcopo_fast.rewards.videoalign:GreyMotionQuality",
    "videoalign_ta": "arcopo_fast.rewards.videoalign:TextAlignment",
    "videoalign_vq_raw": "arcopo_fast.rewards.videoalign:RawVisualQuality",
    "videoalign_mq_raw": "arcopo_fast.rewards.videoalign:RawMotionQuality",
    "videoalign_ta_raw": "arcopo_fast.rewards.videoalign:RawTextAlignment",
    "hpsv3": "arcopo_fast.rewards.hpsv3:HPSv3",
    "hpsv3_every_4th": "arcopo_fast.rewards.hpsv3:HPSv3Every4th",
}
"""By name, what makes a reward when it is called without arguments. One that takes GPU memory of its own, weights and working set, says how
much in an attribute `bytes`; one that goes by seconds, not frames, has an attribute `fps`; one that reads published files names them in an
attribute `sources`."""


def load_reward(name: str, *, fps: float = 16.0, device: torch.device | str | None = None) -> Reward:
    """The reward of that name.

    Args:
        fps: frames per second of the videos it will be given; what has an attribute `fps` is told.
        device: a reward that is a torch module is sent there. None: it stays in host memory.

    Raises:
        UserError: there is none, or it cannot be imported.
    """
    reward: Reward = find(REWARDS[name], "reward")() if name in REWARDS else load_own(_own(name))
    if goes_by_seconds(reward):
        _judge(reward).fps = fps
    if device is not None and isinstance(reward, nn.Module):
        reward.to(device)
    return reward


def goes_by_seconds(reward: Reward) -> bool:
    """Its scores depend on the rate of the videos, which it must be told."""
    return hasattr(_judge(reward), "fps")


def _judge(reward: Reward) -> Any:
    return reward.function if isinstance(reward, OwnReward) else reward


def reward_bytes(names: Iterable[str]) -> int:
    """GPU memory that rewards say they take; those of the same `sources` have one model in common. One that says nothing takes none."""
    found: dict[str, Any] = {name: find(REWARDS[name] if name in REWARDS else _own(name), "reward") for name in names}
    return sum({getattr(reward, "sources", name): getattr(reward, "bytes", 0) for name, reward in found.items()}.values())


def reward_files(name: str) -> Sequence[tuple[str, Sequence[str]]]:
    """The published files that a reward says it reads: sources, see `hub.find`, each with what is needed of it. Nothing is loaded."""
    found: Any = find(REWARDS[name] if name in REWARDS else _own(name), "reward")
    return getattr(found, "sources", ())


def _own(name: str) -> str:
    if ":" not in name:
        raise UserError(f"there is no reward {name!r}; give {', '.join(REWARDS)}, or one of your own as package.module:function")
    return name
