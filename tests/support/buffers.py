"""Replay buffers of random groups."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcopo_fast.data.buffer import Buffer

POLICY = {"checkpoint": "9f86d081884c7d65", "sampler": {"steps": [1000, 500], "shift": 5.0}, "lora": 4}


RECIPE = {"seed": 7, "rollout": {"group_size": 12, "noise_strength": 0.5}}


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)


def group() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of odd shapes, one of each dtype at least, and metadata."""
    shapes = [(), (1,), (3, 0, 2), *([random.randrange(1, 6) for _ in range(random.randrange(1, 6))] for _ in DTYPES)]
    tensors = {f"x/{number}": (8 * torch.randn(tuple(shape))).to(random.choice(DTYPES)) for number, shape in enumerate(shapes)}
    tensors |= {str(dtype): (8 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES}
    text = 'a "red"\n fox, Füchsin "sha256":"'
    return tensors, {"prompt": text, "pivot": random.randrange(7), "sigma": random.random(), "seeds": [1, {"b": None}]}


def same(left: Tensor, right: Tensor) -> bool:
    """To the bit."""
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)


def filled(path: Path, groups: int, policy: dict[str, Any] = POLICY) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Fill a buffer; returns what was put in."""
    buffer = Buffer.create(path, policy, RECIPE)
    made = [group() for _ in range(groups)]
    for index in buffer.missing(groups):
        buffer.write(index, *made[index])
    return made


def file_of(path: Path, index: int) -> Path:
    return path / "entries" / f"{index:06d}.safetensors"


def names(path: Path) -> list[str]:
    """Return the names in a buffer's directory of entries, hidden files too."""
    return sorted(os.listdir(path / "entries"))
