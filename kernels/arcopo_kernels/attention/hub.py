"""FlashAttention 3 or 4 as the `kernels` package fetches it, built for this PyTorch: nothing is compiled here.

    ARCOPO_FLASH_KERNEL=kernels-community/flash-attn3 python ...

Only where this variable names a repository, for it is code from the network. Its functions are found by the names that FlashAttention
gives them, which are not its public ones: those return no log-sum-exp, or take none.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

VARIABLE = "ARCOPO_FLASH_KERNEL"
MODULES = ("", ".flash_attn_interface", ".interface", ".cute.interface")
"""Submodules of a build in which its functions may lie."""


class Build(NamedTuple):
    """The functions of a build; `four`: they are FlashAttention 4's, which takes and returns its tensors in another way."""

    forward: Any
    backward: Any
    four: bool


@cache
def build(repository: str) -> Build:
    """Return the functions of a repository of builds.

    Raises:
        ImportError: the package `kernels` is missing, there is no build for this PyTorch, or it has no such functions.
    """
    try:
        module = import_module("kernels").get_kernel(repository)
    except Exception as error:  # whatever the network, the hub or a build of another PyTorch raises
        raise ImportError(f"{repository}: {type(error).__name__}: {error}") from error
    for below in MODULES:
        try:
            place = import_module(module.__name__ + below) if below else module
        except ImportError:
            continue
        for four, names in enumerate((("_flash_attn_forward", "_flash_attn_backward"), ("_flash_attn_fwd", "_flash_attn_bwd"))):
            if all(hasattr(place, name) for name in names):
                return Build(getattr(place, names[0]), getattr(place, names[1]), bool(four))
    raise ImportError(f"{repository} has neither FlashAttention 3's nor 4's functions")


def missing() -> str | None:
    """Return why there is no build to use; None if there is one."""
    repository = os.environ.get(VARIABLE, "")
    if not repository:
        return f"{VARIABLE} names no repository of builds"
    try:
        build(repository)
    except ImportError as error:
        return str(error)
    return None


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, Tq, H, D] and the log-sum-exps [B, H, Tq]."""
    found = build(os.environ[VARIABLE])
    more = {"causal": False} | ({"return_lse": True} if found.four else {})
    out, lse, *_ = found.forward(q=query, k=key, v=value, softmax_scale=scale, **more)
    return out, lse


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV, all of them."""
    found = build(os.environ[VARIABLE])
    arguments = {"q": query, "k": key, "v": value, "out": out, "dout": grad_out, "softmax_scale": scale}
    if found.four:
        grad_query, grad_key, grad_value = found.backward(**arguments, lse=lse, causal=False)
        return grad_query, grad_key, grad_value
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
    found.backward(**arguments, softmax_lse=lse, **dict(zip(("dq", "dk", "dv"), grads)), is_causal=False)
    return grads[0], grads[1], grads[2]
