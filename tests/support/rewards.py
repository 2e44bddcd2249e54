"""One reward by its name."""

from __future__ import annotations

from typing import Any

from arcopo_fast.rewards.registry import load_rewards


def load_reward(name: str, **settings: Any) -> Any:
    """Return the judge of a score, whatever class it is of. settings: of `load_rewards`."""
    return load_rewards([name], **settings)[name]
