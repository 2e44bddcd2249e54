"""What tells a reward from what it was before an edit or an update: kept beside scores, so that none are compared that two states gave."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.client import RemoteReward
from arcopo_fast.rewards.own import OwnReward

SAMPLES = 64


def fingerprint_of(reward: Reward) -> str:
    """16 hexadecimal digits: a digest of the file that the reward's code is in, and of its weights and other tensors.

    Of a tensor, its name, dtype, shape and up to 2 x `SAMPLES` of its elements: training changes all of them, and to read the weights of a
    large judge would take longer than to load them. Tensors are found in a torch module's state, and in modules that are an object's
    attributes. Not covered: the files that a reward's file imports, and what it reads at a call. Of a served reward it is what the server
    says, "unknown" if it says nothing.

    Raises:
        RewardServerError: see there.
    """
    if isinstance(reward, RemoteReward):
        return reward.fingerprint()
    judge = reward.function if isinstance(reward, OwnReward) else reward
    code = judge if inspect.isroutine(judge) else type(judge)
    digest = hashlib.sha256(f"{getattr(code, '__module__', '')}:{getattr(code, '__qualname__', '')}\n".encode())
    if (file := _source(code)) is not None:
        digest.update(file.read_bytes())
    for name, tensor in _tensors(judge):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _source(code: Any) -> Path | None:
    """The file that a class or function is written in; None for one that has none, such as one in C."""
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(code)) or "")
    except TypeError:
        return None
    return file if file.is_file() else None


def _tensors(judge: Any) -> Iterator[tuple[str, Tensor]]:
    modules = {"": judge} if isinstance(judge, nn.Module) else {name: one for name, one in _attributes(judge) if isinstance(one, nn.Module)}
    for prefix, module in modules.items():
        for name, value in module.state_dict(prefix=f"{prefix}.").items():
            if isinstance(value, Tensor):
                yield name, value


def _attributes(judge: Any) -> list[tuple[str, Any]]:
    """The attributes of an object, of which some have none."""
    return sorted(getattr(judge, "__dict__", {}).items())
