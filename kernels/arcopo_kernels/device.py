"""Triton launches on the current GPU, wherever the tensors are: what launches a kernel makes theirs the current one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def on_device_of_tensors(launcher: Callable[P, T]) -> Callable[P, T]:
    """Decorator of launchers: the GPU of the first tensor given, or first in a list given, is the current one during the call."""

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> T:
        given = (x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        with torch.cuda.device_of(next(x for x in given if isinstance(x, Tensor))):
            return launcher(*args, **kwargs)

    return launch
