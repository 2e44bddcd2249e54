"""The backends of the attention over one segment: a table of kernels with one interface.

A backend attends queries [B, Tq, H, D] to keys and values [B, Tk, H, D] and returns the output with the scores' log-sum-exp [B, H, Tq]
(natural logarithm, float32 at least). Its backward is given the output and log-sum-exp over *all* segments of a call. Then

    P = exp(scale q k^T - lse),  delta = rowsum(dO * O),  dS = P * (dO v^T - delta),  dQ = scale dS k,  dK = scale dS^T q,  dV = P^T dO

are this segment's columns of the whole softmax's backward: dK and dV are exact, and the dQ of the segments add up. Ring attention
(arXiv 2310.01889) rests on the same identity, so every kernel with a backward for plain dense attention serves. Nothing is copied:
PyTorch's own operators get [B, H, T, D] views.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from arcopo_kernels import dispatch
from arcopo_kernels.attention import hub
from arcopo_kernels.dispatch import Choice
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Gradients = tuple[Tensor, "Tensor | None", "Tensor | None"]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], Gradients]


class Backend(NamedTuple):
    """One entry of the table.

    Attributes:
        unsupported: (query, key, value) -> why it cannot take this call; None if it can.
        forward: (query, key, value, scale) -> out, lse.
        backward: (grad_out, query, key, value, out, lse, scale, trained) -> dQ, dK, dV; dK and dV may be None unless the segment is
            trained.
    """

    unsupported: Callable[[Tensor, Tensor, Tensor], str | None]
    forward: Forward
    backward: Backward


# Plain PyTorch, any device and dtype: the oracle of the identity above. It keeps all scores. Autocast would round what the backward pass,
# which runs outside of it, computes again without rounding.


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", query * scale, key)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _math_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = _wide(query, key, value)
        scores = _scores(query, key, scale)
        lse = scores.logsumexp(-1)
        return torch.einsum("bhqk,bkhd->bqhd", (scores - lse.unsqueeze(-1)).exp(), value), lse


def _math_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, trained: bool
) -> Gradients:
    with torch.autocast(query.device.type, enabled=False):
        grad_out, query, key, value, out = _wide(grad_out, query, key, value, out)
        weights = (_scores(query, key, scale) - lse.unsqueeze(-1)).exp()
        delta = (grad_out * out).sum(-1).transpose(1, 2).unsqueeze(-1)
        grad_scores = scale * weights * (torch.einsum("bqhd,bkhd->bhqk", grad_out, value) - delta)
        grad_query = torch.einsum("bhqk,bkhd->bqhd", grad_scores, key)
        if not trained:
            return grad_query, None, None
        grad_key = torch.einsum("bhqk,bqhd->bkhd", grad_scores, query)
        return grad_query, grad_key, torch.einsum("bhqk,bqhd->bkhd", weights, grad_out)


# PyTorch's own fused operators. They always compute dK and dV. On a CPU that costs nothing: the three products and the exponential that a
# frozen segment needs, over all scores, took as long as the five in tiles.


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _cpu_unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    return None if query.device.type == "cpu" else f"the tensors are on {query.device.type}"


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(query, key, value), scale=scale)
    return out.transpose(1, 2), lse


def _through(backward: Callable[..., Any], tensors: Sequence[Tensor], lse: Tensor, *rest: Any, scale: float) -> Gradients:
    """Return what PyTorch's backward of a fused operator gives for grad_out, query, key, value and out, [B, T, H, D] each."""
    grad_query, grad_key, grad_value = _heads_first(*backward(*_heads_first(*tensors), lse, *rest, scale=scale))
    return grad_query, grad_key, grad_value


def _cpu_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, trained: bool
) -> Gradients:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return _through(backward, (grad_out, query, key, value, out), lse, 0.0, False, scale=scale)


def merge_pairwise(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what `reference.merge_attention` does, one set of keys after the other and with half its passes; each query sees a key of
    each set."""
    out, lse = outs[0].to(lses[0].dtype), lses[0]
    for more, more_lse in zip(outs[1:], lses[1:]):
        share = torch.sigmoid(more_lse - lse)  # e^b / (e^a + e^b)
        out = torch.lerp(out, more.to(lse.dtype), share.transpose(1, 2).unsqueeze(-1))
        lse = torch.logaddexp(lse, more_lse)
    return out.to(outs[0].dtype), lse


def _half_on_nvidia(query: Tensor) -> str | None:
    if query.device.type != "cuda":
        return f"the tensors are on {query.device.type}"
    if torch.version.hip is not None:
        return "it is untested on ROCm"
    if query.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {query.dtype}"
    return None


def _sdpa_refuses(can_use: Callable[..., bool], query: Tensor, key: Tensor, value: Tensor) -> str | None:
    # PyTorch knows which versions of its kernels fail on which shapes and devices, and what the user switched off.
    query, key, value = _heads_first(query, key, value)
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    with torch.cuda.device_of(query):  # it asks the current device
        if can_use(params):
            return None
    shapes = f"queries [B, H, Tq, D] = {list(query.shape)} over {key.shape[2]} keys"
    return f"torch.backends.cuda.{can_use.__name__} refuses {shapes} (debug=True says why)"


def _cudnn_unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    reason = _half_on_nvidia(query)
    if reason is None and torch.cuda.get_device_capability(query.device) < (9, 0):
        reason = "it is the faster one from compute capability 9.0 on only"
    reason = reason or cudnn_fault(
        version=torch.backends.cudnn.version() or 0,
        queries=query.shape[1],
    )
    return reason or _sdpa_refuses(torch.backends.cuda.can_use_cudnn_attention, query, key, value)


def cudnn_fault(*, version: int, queries: int) -> str | None:
    """Return the known fault of cuDNN's attention, or of PyTorch's way to it, that a call would meet; None if it meets none.

    Whether a gradient is wanted makes no difference: a prediction with and one without must come from the same kernel to be compared.

    Args:
        version: as `torch.backends.cudnn.version()` gives it, 91900 for 9.19.0.
    """
    if queries == 1:
        return "its backward returns NaN for one query in some versions"  # NVIDIA/cudnn-frontend issue 1072
    if version <= 91500:
        # pytorch/pytorch issue 169849; PyTorch itself prefers it from 9.15.1 on, but does not refuse it before
        return f"cuDNN {version} may read past the end of sequences that are no multiple of 128 long; 9.15.1 does not"
    # pytorch/pytorch issue 196678, a gradient that is NaN where keys % 128 == 64, needs an explicit mask: none is ever passed here.
    if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1":
        # pytorch/pytorch pull request 155958
        return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 makes PyTorch expect log-sum-exps in another layout"
    return None


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = attend(*_heads_first(query, key, value), None, True, scale=scale)  # no bias; log-sum-exp [B, H, Tq, 1]
    return out.transpose(1, 2), lse.squeeze(-1)


def _cudnn_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, trained: bool
) -> Gradients:
    # PyTorch caches cuDNN's plans by shapes and by the strides of q, k and v, in some versions not of out and grad_out: those two are
    # always contiguous [B, Tq, H, D] here, as the query is. Seed and offset are read by dropout only.
    unused = torch.empty((), dtype=torch.int64, device=query.device)
    tokens, keys = query.shape[1], key.shape[1]
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    rest = (unused, unused, None, None, None, tokens, keys, 0.0, False)  # seed, offset, bias, ragged lengths, lengths, dropout, causal
    return _through(backward, (grad_out, query, key, value, out), lse.unsqueeze(-1), *rest, scale=scale)


def _unpadded(query: Tensor) -> str | None:
    # The functions that users call pad; those beneath, which are called here, raise.
    return f"head_dim {query.shape[-1]} is not a multiple of 8" if query.shape[-1] % 8 else None


def _flash_unsupported(implementation: str | None, majors: Sequence[int] = ()) -> Callable[[Tensor, Tensor, Tensor], str | None]:
    """Return the check of PyTorch's flash operator: its own FlashAttention 2, or FA3 or FA4 where the process has put one of them in its
    place."""

    def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
        active = torch.nn.attention.current_flash_attention_impl()
        reason = _half_on_nvidia(query)
        if reason is None and active != implementation:
            wanted = f"activate_flash_attention_impl({implementation!r})" if implementation else "restore_flash_attention_impl()"
            reason = f"PyTorch's flash operator is {active or 'FlashAttention 2'} in this process; call torch.nn.attention.{wanted} first"
        if reason is None and majors and torch.cuda.get_device_capability(query.device)[0] not in majors:
            reason = f"it needs compute capability {' or '.join(f'{major}.x' for major in majors)}"
        reason = reason or _unpadded(query)
        return reason or _sdpa_refuses(torch.backends.cuda.can_use_flash_attention, query, key, value)

    return unsupported


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_heads_first(query, key, value), scale=scale)
    return out.transpose(1, 2), lse


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, trained: bool
) -> Gradients:
    state = torch.empty(2, dtype=torch.uint64, device=query.device)  # of the random numbers, read by dropout only
    tokens, keys = query.shape[1], key.shape[1]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    rest = (None, None, tokens, keys, 0.0, False, state, state)  # ragged lengths, lengths, dropout, causal, random state
    return _through(backward, (grad_out, query, key, value, out), lse, *rest, scale=scale)


# PyTorch's memory-efficient operator: slower than flash, but it takes float32, and keeps no scores either.


def _efficient_unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if query.device.type != "cuda":
        return f"the tensors are on {query.device.type}"
    if torch.version.hip is not None:
        return "it is untested on ROCm"
    if query.dtype not in (*HALF, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {query.dtype}"
    multiple = 4 if query.dtype == torch.float32 else 8
    if query.shape[-1] % multiple:
        return f"head_dim {query.shape[-1]} is not a multiple of {multiple}"
    return _sdpa_refuses(torch.backends.cuda.can_use_efficient_attention, query, key, value)


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = attend(*_heads_first(query, key, value), None, True, scale=scale)  # log-sum-exps padded to a multiple of 32 queries
    return out.transpose(1, 2), lse[..., : query.shape[1]]


def _efficient_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, trained: bool
) -> Gradients:
    # The kernel reads log-sum-exps of queries that are not there: at infinity their weights are zero.
    padded = torch.nn.functional.pad(lse, (0, -query.shape[1] % 32), value=torch.inf)
    unused = torch.zeros((), dtype=torch.int64, device=query.device)
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    grad_out, query, key, value, out = _heads_first(grad_out, query, key, value, out)
    rest = (unused, unused, 0.0, [True, trained, trained, False])  # seed, offset, dropout, whose gradients
    grads = backward(grad_out, query, key, value, None, out, padded, *rest, scale=scale)[:3]
    grad_query, grad_key, grad_value = (grad.transpose(1, 2) if wanted else None for grad, wanted in zip(grads, (True, trained, trained)))
    assert grad_query is not None
    return grad_query, grad_key, grad_value


# FlashAttention 3 or 4, built by others.


def _hub_unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    reason = _half_on_nvidia(query)
    if reason is None and torch.cuda.get_device_capability(query.device)[0] not in (9, 10):
        reason = "it needs compute capability 9.x or 10.x"
    return reason or _unpadded(query) or hub.missing()


# The flash-attn package, 2.7 or newer: the same algorithm as PyTorch's flash operator, for who has a build of it that is better.

PLAIN: dict[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def _flash_attn_unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    try:
        import flash_attn.flash_attn_interface  # noqa: F401
    except ImportError as error:
        return f"flash_attn cannot be imported ({error})"
    return _unpadded(query) or _half_on_nvidia(query)


def _flash_attn_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward as forward

    out, lse, *_ = forward(q=query, k=key, v=value, softmax_scale=scale, return_softmax=False, **PLAIN)
    return out, lse


def _flash_attn_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, trained: bool
) -> Gradients:
    from flash_attn.flash_attn_interface import _flash_attn_backward as backward

    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
    arguments = {"dout": grad_out, "q": query, "k": key, "v": value, "out": out, "softmax_lse": lse}
    backward(**arguments, **dict(zip(("dq", "dk", "dv"), grads)), softmax_scale=scale, deterministic=False, **PLAIN)
    return grads[0], grads[1], grads[2]


# Our own kernels: dK and dV of frozen segments are not computed.


def _triton_unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if not dispatch.TRITON_INSTALLED:
        return "triton is not installed"
    if query.device.type != "cuda" and not dispatch.INTERPRETED:
        return f"the tensors are on {query.device.type}; only Triton's interpreter (TRITON_INTERPRET=1) could take them"
    return _triton("unsupported")(query, key, value)


def _triton(name: str) -> Callable[..., Any]:
    """Return a function of our kernels' module, which is imported when it is called."""

    def call(*arguments: Any) -> Any:
        from arcopo_kernels.attention import triton

        return getattr(triton, name)(*arguments)

    return call


BACKENDS = {
    "math": Backend(lambda query, key, value: None, _math_forward, _math_backward),
    "cpu": Backend(_cpu_unsupported, _cpu_forward, _cpu_backward),
    "cudnn": Backend(_cudnn_unsupported, _cudnn_forward, _cudnn_backward),
    "flash": Backend(_flash_unsupported(None), _flash_forward, _flash_backward),
    "fa3": Backend(_flash_unsupported("FA3", (9,)), _flash_forward, _flash_backward),
    "fa4": Backend(_flash_unsupported("FA4", (9, 10)), _flash_forward, _flash_backward),
    "kernels": Backend(_hub_unsupported, hub.forward, hub.backward),
    "efficient": Backend(_efficient_unsupported, _efficient_forward, _efficient_backward),
    "flash_attn": Backend(_flash_attn_unsupported, _flash_attn_forward, _flash_attn_backward),
    "triton": Backend(_triton_unsupported, _triton("forward"), _triton("backward")),
}

AUTO = ("kernels", "fa4", "fa3", "cudnn", "flash", "triton", "math")
"""The order in which "auto" asks, for half precision on a GPU. The first three take a call only where the process has asked for them."""

FASTEST = AUTO[: AUTO.index("flash")]
"""Those that use what a GPU of compute capability 9.0 or more has for the purpose."""

AUTO_FLOAT32 = ("efficient", "math")
"""The same for float32 on a GPU. Plain products keep all scores: gigabytes for each layer of a video."""

AUTO_ON_CPU = ("cpu", "math")
"""The same on a CPU, for every dtype. The fused kernel is faster than plain products from 32 queries over 8 keys on."""


def choose(requested: str, query: Tensor, segments: Sequence[tuple[Tensor, Tensor]]) -> list[Choice]:
    """Return the backend of each segment of a call: the one requested by name, or for "auto" the first that can take it.

    The merge by log-sum-exp does not care who attended to what, so that a length that one backend refuses costs that segment alone.

    Args:
        query: [B, Tq, H, D].
        segments: key and value [1 or B, Tk, H, D] of each segment.

    Returns:
        For each segment the name of its backend and the reason for it.

    Raises:
        ValueError: the backend requested cannot take this call.
    """
    return [_choice(requested, folded(query, key), key, value) for key, value in segments]


def _choice(requested: str, query: Tensor, key: Tensor, value: Tensor) -> Choice:
    order = AUTO_ON_CPU if query.device.type != "cuda" else AUTO if query.dtype in HALF else AUTO_FLOAT32
    refusals: list[str] = []
    for name in order if requested == "auto" else (requested,):
        reason = BACKENDS[name].unsupported(query, key, value)
        if reason is None:
            return Choice(name, "asked for" if requested == name else "; ".join(refusals) or "the first choice")
        refusals.append(f"not {name}: {reason}")
    raise ValueError(f"segment_attention: {requested!r} was asked for, but {reason}; use 'auto' to let the tensors decide")


def together(choices: Sequence[Choice]) -> Choice:
    """Return what a call as a whole ran on: "cudnn", or "cudnn and flash" with the reason for each."""
    reasons = {choice.name: choice.reason for choice in choices}
    if len(reasons) == 1:
        return choices[0]
    return Choice(" and ".join(reasons), "; ".join(f"{name} for some segments: {reason}" for name, reason in reasons.items()))


def slow_on_hopper(choice: Choice, capability: tuple[int, int]) -> str | None:
    """Return one line if a GPU of compute capability 9.0 or more attends by a backend that does not use it; None if all is well."""
    slow = [name for name in choice.name.split(" and ") if name not in FASTEST]
    if capability < (9, 0) or not slow:
        return None
    return f"attention runs on {' and '.join(slow)}, not on cuDNN or better, and takes longer than it need: {choice.reason}"


def folded(query: Tensor, key: Tensor) -> Tensor:
    """Return the query [B, Tq, H, D] as it attends to a key: one long sequence [1, B * Tq, H, D], a view, if the key is shared."""
    return query.flatten(0, 1).unsqueeze(0) if key.shape[0] < query.shape[0] else query
