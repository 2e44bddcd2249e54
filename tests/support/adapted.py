"""A small generator whose adapter is in the middle of training, and groups of its videos."""

from __future__ import annotations

from typing import Any

import torch

from arcopo_fast.model.lora import adapter_parameters, add_lora
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Group
from arcopo_fast.rollout.noise import GroupId, NoisePlan
from support.models import random_text, small_engine, small_model

GROUP = 6
"""The members of a group."""


def fresh_engine(dtype: torch.dtype = torch.float32, **more: Any) -> Engine:
    """Return an engine whose adapter adds nothing yet. more: see `small_engine`."""
    return small_engine(add_lora(small_model(dtype), rank=4, alpha=8, seed=1), **{"branches": GROUP, **more})


def adapted_engine(dtype: torch.dtype = torch.float32, **more: Any) -> Engine:
    """Return an engine whose adapter is in the middle of training: B is not zero any more. more: see `small_engine`."""
    engine = fresh_engine(dtype, **more)
    with torch.no_grad():
        for parameter in adapter_parameters(engine.model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return engine


def make_group(engine: Engine, pivot: int = 1, plan: NoisePlan | None = None) -> Group:
    """Return a group of `GROUP` videos of a random prompt and seed; without a `plan`, AR-CoPO's of strength 0.5."""
    name = GroupId(seed=int(torch.randint(10**6, ())))
    return engine.rollout(random_text(), name, pivot=pivot, members=GROUP, plan=plan or NoisePlan(0.5))
