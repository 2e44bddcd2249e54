"""What tells a reward from what it was before an edit or an update: kept beside scores, so that none are compared that two states gave."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.client import RemoteReward
from arcopo_fast.rewards.custom import OwnReward
from arcopo_fast.storage.identity import sampled_digest


def fingerprint_of(reward: Reward) -> str:
    """16 hexadecimal digits: a digest of the file that the reward's code is in, of the module that names it, and of samples of its tensors.

    Tensors are found in a torch module's state, and in modules that are an object's attributes. Not covered: what those files import, and
    what a reward reads at a call. Of a served reward it is what the server says, "unknown" if it says nothing.

    Raises:
        RewardServerError: see there.
    """
    if isinstance(reward, RemoteReward):
        return reward.fingerprint()
    judge = reward.function if isinstance(reward, OwnReward) else reward
    code = judge if inspect.isroutine(judge) else type(judge)
    sources = [_source(code)]
    if isinstance(reward, OwnReward):
        sources.append(_source(sys.modules.get(reward.name.partition(":")[0])))
    name = f"{getattr(code, '__module__', '')}:{getattr(code, '__qualname__', '')}\n"
    return sampled_digest(_tensors(judge.__self__ if inspect.ismethod(judge) else judge), name.encode() + b"".join(sources))


def _source(code: Any) -> bytes:
    """The file that a module, class or function is written in; nothing for one that has none, such as one in C."""
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(code)) or "")
    except (TypeError, OSError):
        return b""
    return file.read_bytes() if file.is_file() else b""


def _tensors(judge: Any) -> Iterator[tuple[str, Tensor]]:
    attributes = {"": judge} if isinstance(judge, nn.Module) else getattr(judge, "__dict__", {})
    for prefix, module in sorted(attributes.items()):
        if isinstance(module, nn.Module):
            for name, value in module.state_dict(prefix=f"{prefix}.").items():
                if isinstance(value, Tensor):
                    yield name, value
