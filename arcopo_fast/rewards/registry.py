"""Rewards by the name that a recipe gives them: those of the package, and a user's own by import path.

The package's are paths too, and imported when they are asked for: a process that serves one reward needs what that reward needs, no more.
"""

from __future__ import annotations

from typing import Any

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.own import find, load_own

REWARDS = {
    "toy_vq": "arcopo_fast.toy.rewards:VisualQuality",
    "toy_mq": "arcopo_fast.toy.rewards:MotionQuality",
    "toy_ta": "arcopo_fast.toy.rewards:TextAlignment",
    "sharpness": "arcopo_fast.rewards.simple:Sharpness",
    "steadiness": "arcopo_fast.rewards.simple:Steadiness",
}
"""By name, what makes a reward when it is called without arguments. One that takes GPU memory of its own, weights and working set, says how
much in an attribute `bytes`."""


def load_reward(name: str) -> Reward:
    """The reward of that name.

    Raises:
        UserError: there is none, or it cannot be imported.
    """
    if name in REWARDS:
        return find(REWARDS[name], "reward")()
    return load_own(_own(name))


def reward_bytes(name: str) -> int:
    """GPU memory that a reward says it takes; 0 if it says nothing."""
    found: Any = find(REWARDS[name] if name in REWARDS else _own(name), "reward")
    return getattr(found, "bytes", 0)


def _own(name: str) -> str:
    if ":" not in name:
        raise UserError(f"there is no reward {name!r}; give {', '.join(REWARDS)}, or one of your own as package.module:function")
    return name
