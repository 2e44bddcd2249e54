"""Rewards by the names that recipes give their scores: those of the package, and a user's own by import path.

The package's are paths too, and imported when they are asked for: a process that serves one reward needs what that reward needs, no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward, Sources
from arcopo_fast.rewards.custom import Declared, declared, find, load_custom

REWARDS = {
    "toy_vq": "arcopo_fast.toy.rewards:VisualQuality",
    "toy_mq": "arcopo_fast.toy.rewards:MotionQuality",
    "toy_ta": "arcopo_fast.toy.rewards:TextAlignment",
    "sharpness": "arcopo_fast.rewards.simple:Sharpness",
    "steadiness": "arcopo_fast.rewards.simple:Steadiness",
    "clip": "arcopo_fast.rewards.clip:CLIPScore",
    "videoalign_vq": "arcopo_fast.rewards.videoalign:VideoAlignReward",
    "videoalign_mq": "arcopo_fast.rewards.videoalign:VideoAlignReward",
    "videoalign_mq_grey": "arcopo_fast.rewards.videoalign:VideoAlignReward",
    "videoalign_ta": "arcopo_fast.rewards.videoalign:VideoAlignReward",
    "videoalign_vq_raw": "arcopo_fast.rewards.videoalign:VideoAlignReward",
    "videoalign_mq_raw": "arcopo_fast.rewards.videoalign:VideoAlignReward",
    "videoalign_ta_raw": "arcopo_fast.rewards.videoalign:VideoAlignReward",
    "hpsv3": "arcopo_fast.rewards.hpsv3:HPSv3",
    "hpsv3_every_4th": "arcopo_fast.rewards.hpsv3:HPSv3",
}
"""The judge of each score of the package: a subclass of `Reward` that is made without arguments."""


def load_rewards(names: Iterable[str], *, fps: float = 16.0, device: torch.device | str | None = None) -> dict[str, Reward]:
    """Return the judge of each score. A judge of several of them is loaded once.

    Args:
        names: as recipes have them.
        fps: frames per second of the videos; a judge that goes by seconds is told.
        device: where judges that are torch modules are sent. None: they stay in host memory.

    Raises:
        UserError: there is no such score, or its judge cannot be imported.
    """
    paths = {name: _path(name) for name in names}
    judges: dict[str, Reward] = {}
    for name, path in paths.items():
        if path not in judges:
            judge: Reward = find(path, "reward")() if name in REWARDS else load_custom(path)
            if judge.fps is not None:
                judge.fps = fps
            if device is not None and isinstance(judge, nn.Module):
                judge.to(device)
            judges[path] = judge
        if name not in judges[path].scores:
            raise UserError(f"reward {name!r} is not a score of {path}; give {', '.join(judges[path].scores)}")
    return {name: judges[path] for name, path in paths.items()}


def reward_bytes(names: Iterable[str]) -> int:
    """Return the GPU memory that the judges of these scores say they take, each counted once. Nothing is loaded."""
    return sum({_path(name): _declared(name).bytes for name in names}.values())


def reward_files(name: str) -> Sources:
    """Return the published files that the judge of a score says it reads. Nothing is loaded."""
    return _declared(name).sources


def judges() -> Mapping[str, list[str]]:
    """Return the names of each judge's scores, by the judge's path."""
    found: dict[str, list[str]] = {}
    for name, path in REWARDS.items():
        found.setdefault(path, []).append(name)
    return found


def _path(name: str) -> str:
    """Return where the judge of a score is imported from: package.module:judge."""
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        raise UserError(f"there is no reward {name!r}; give {', '.join(REWARDS)}, or a custom reward as package.module:function")
    return ":".join(name.split(":")[:2])  # behind a second colon is which of its scores


def _declared(name: str) -> type[Reward] | Declared:
    path = _path(name)
    found = find(path, "reward")
    return found if name in REWARDS else declared(path, found)
