"""Launch every kernel once, forward and backward, on small odd shapes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m benchmarks.every_kernel [--operator NAME ...] [--plant]

Exit status 1 if a kernel in an operator's `aot_cases` was not launched. --plant writes out of bounds instead: a sanitizer that does
not see that sees nothing. Inputs are made on the host, so that hardly any kernel but ours runs. Without a GPU, set TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from arcopo_kernels import dispatch
from arcopo_kernels.aot import OPERATORS, cases
from arcopo_kernels.device import INTERPRETER_TARGET
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float16,)
"""The interpreter is slow, and multiplies bfloat16 matrices wrongly."""


def new(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype).requires_grad_(grad)


def integers(*values: int) -> Tensor:
    return torch.tensor(values).to(DEVICE)


def surrogate() -> None:
    from arcopo_kernels.surrogate import copo_surrogate

    for dtype in DTYPES:
        pred, old_pred, candidates = new(3, 5003, dtype=dtype, grad=True), new(3, 5003, dtype=dtype), new(2, 5, 5003)
        for steps in (None, integers(1, 0, 1)):
            copo_surrogate(pred, old_pred, candidates, new(5), steps, tau=1.0).loss.sum().backward()


def attention() -> None:
    from arcopo_kernels.attention import Segment, segment_attention
    from arcopo_kernels.attention.triton import merge

    for dtype in DTYPES:
        query, key, value = (new(2, 33, 3, 16, dtype=dtype, grad=True) for _ in range(3))
        prefixes = [Segment(new(1, tokens, 3, 16, dtype=dtype), new(1, tokens, 3, 16, dtype=dtype), frozen=True) for tokens in (37, 1)]
        out = segment_attention(query, [*prefixes, Segment(key, value)])
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
        for parts in range(2, 7):
            merge([out.detach()] * parts, [new(2, 3, 33)] * parts)


def paging() -> None:
    from arcopo_kernels.paging import copy_pages

    for dtype in (*DTYPES, torch.int8):
        keys, values = (new(2, 7, 5, 3, 11).to(dtype) for _ in range(2))
        copy_pages(keys, values, integers(0, 3, 0), integers(6, 1, 2))


def qk_norm_rope() -> None:
    from arcopo_kernels.qk_norm_rope import apply_rope, qk_norm_rope, rms_norm

    grid, position = (2, 1, 3), integers(4)
    for dtype in DTYPES:
        query, key = (new(2, 6, 3, 10, dtype=dtype, grad=True) for _ in range(2))
        weight, other = (new(30, dtype=dtype, grad=True) for _ in range(2))
        for leaves in ([query, key], [query, key, weight, other]):
            roped = qk_norm_rope(query, key, weight, other, grid=grid, position=position)
            torch.autograd.grad(roped, leaves, [torch.ones_like(x) for x in roped])
        rms_norm(query.flatten(2), weight).sum().backward()
        apply_rope(query, 3, grid).sum().backward()


def nft() -> None:
    from arcopo_kernels.nft import nft_loss

    for dtype in DTYPES:
        pred, old_pred, target = new(3, 5003, dtype=dtype, grad=True), new(3, 5003, dtype=dtype), new(3, 5003, dtype=dtype)
        nft_loss(pred, old_pred, target, torch.rand(3).to(DEVICE), beta=0.1).loss.sum().backward()


def modulation() -> None:
    from arcopo_kernels.modulation import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate

    for dtype in DTYPES:
        x, y = (new(2, 3, 5, 30, dtype=dtype, grad=True) for _ in range(2))
        gate, scale, shift = (new(batch, frames, 1, 30, dtype=dtype, grad=True) for batch, frames in ((2, 3), (1, 3), (2, 1)))
        weight, bias = (new(30, dtype=dtype, grad=True) for _ in range(2))
        gated_residual(x, y, gate).sum().backward()
        layer_norm_modulate(x, scale=scale, shift=shift).sum().backward()
        for leaves in ([x, y], [x, y, gate, scale, shift, weight, bias]):
            outs = gated_residual_layer_norm_modulate(x, y, gate, scale=scale, shift=shift, weight=weight, bias=bias)
            torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])


def norm_silu() -> None:
    from arcopo_kernels.norm_silu import norm_silu

    for dtype in DTYPES:
        buffer = new(2, 69, 35, dtype=dtype)
        norm_silu(new(2, 67, 35, dtype=dtype), new(35, dtype=dtype), out=buffer[:, 2:])


def lora_linear() -> None:
    from arcopo_kernels.lora_linear import lora_linear, lora_linears

    for dtype in DTYPES:
        x, down, up = new(67, 35, dtype=dtype, grad=True), new(2, 5, 35, grad=True), new(2, 131, 5, grad=True)
        weight, bias = new(131, 35, dtype=dtype), new(131, dtype=dtype)
        for gelu in (False, True):
            outs = lora_linears(x, [weight, weight], [bias, None], down, up, gelu=gelu)
            torch.autograd.grad(outs, (x, down, up), [torch.ones_like(out) for out in outs])
            with torch.no_grad():
                lora_linear(x, weight, bias, down[0], up[0], gelu=gelu)


OF_OPERATORS = (surrogate, attention, paging, qk_norm_rope, modulation, norm_silu, nft, lora_linear)
CALLS: dict[str, Callable[[], None]] = {call.__name__: call for call in OF_OPERATORS}


@contextmanager
def launched(kernels: Sequence[object]) -> Iterator[set[str]]:
    """The names of the kernels that are launched inside the block, `kernel[grid](...)`."""
    names: set[str] = set()

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def getitem(kernel: Any, grid: Any) -> Any:
            names.add(kernel.__name__)
            return original(kernel, grid)

        return getitem

    with ExitStack() as stack:
        kinds: set[Any] = {type(kernel) for kernel in kernels}
        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "__getitem__", recording(kind.__getitem__)))
        yield names


@triton.jit
def _out_of_bounds(pointer, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(pointer + tl.arange(0, SIZE), 1.0)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.every_kernel", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--operator", nargs="+", default=OPERATORS, choices=OPERATORS)
    parser.add_argument("--plant", action="store_true", help="write out of bounds")
    arguments = parser.parse_args(argv)
    if arguments.plant:
        with suppress(RuntimeError):  # what the sanitizer has seen, the program need not report
            _out_of_bounds[(1,)](new(8), SIZE=4096)
            torch.cuda.synchronize()
        return 0
    missing = []
    for operator in arguments.operator:
        kernels = {case.kernel.__name__: case.kernel for case in cases(INTERPRETER_TARGET, [operator])}
        with dispatch.use("triton"), launched(list(kernels.values())) as names:
            CALLS[operator]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        print(f"{operator}: {', '.join(sorted(names))}", flush=True)
        missing += [f"{operator}.{name}" for name in kernels if name not in names]
    if missing:
        print(f"not launched: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
