"""The copy behind copy-on-write: pages of all layers, keys and values together, in one launch.

It moves bits: elements are loaded and stored as integers of their size, whatever their dtype. Bound by bandwidth alone, so all there is to
choose is how many bytes are in flight.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from arcopo_kernels.aot import AotCase
from arcopo_kernels.device import BlockSizes, on_device_of_tensors
from arcopo_kernels.dispatch import FP_FUSION
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by size in bytes."""


def block_sizes(page_elements: int, itemsize: int) -> BlockSizes:
    """Return tiles of 8 KiB of keys and as much of values: eight loads of 16 bytes for each of 128 threads, all issued before the first
    store."""
    return BlockSizes(min(8192 // itemsize, triton.next_power_of_2(page_elements)), num_warps=4)


@triton.jit
def _copy_pages(
    keys_ptr,  # [layers, pages, page_elements]
    values_ptr,  # the same
    sources_ptr,  # [n] int64
    targets_ptr,  # [n] int64
    layer_elements,
    page_elements,
    BLOCK: tl.constexpr,
):
    # Grid: [n * tiles of a page, layers].
    tiles = tl.cdiv(page_elements, BLOCK)
    copy = tl.program_id(0) // tiles
    within = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = within < page_elements
    layer = tl.program_id(1).to(tl.int64) * layer_elements
    source = layer + tl.load(sources_ptr + copy) * page_elements + within
    target = layer + tl.load(targets_ptr + copy) * page_elements + within
    key = tl.load(keys_ptr + source, mask=inside)
    value = tl.load(values_ptr + source, mask=inside)
    tl.store(keys_ptr + target, key, mask=inside)
    tl.store(values_ptr + target, value, mask=inside)


@on_device_of_tensors
def copy_pages(keys: Tensor, values: Tensor, sources: Tensor, targets: Tensor, sizes: BlockSizes | None = None) -> None:
    """Copy pages of keys and values [layers, pages, ...], contiguous, from `sources` to `targets`, both [n] int64."""
    layers, pages = keys.shape[:2]
    page_elements = keys[0, 0].numel()
    if not sources.numel() or not page_elements:
        return
    sizes = sizes or block_sizes(page_elements, keys.itemsize)
    integer = INTEGERS[keys.itemsize]
    _copy_pages[sources.numel() * triton.cdiv(page_elements, sizes.block), layers](
        keys.view(integer),
        values.view(integer),
        sources.contiguous(),
        targets.contiguous(),
        pages * page_elements,
        page_elements,
        BLOCK=sizes.block,
        num_warps=sizes.num_warps,
        enable_fp_fusion=FP_FUSION,
    )


def _aot_case(name: str, itemsize: int, page_elements: int) -> AotCase:
    sizes = block_sizes(page_elements, itemsize)
    integer = f"*i{8 * itemsize}"
    signature = {"keys_ptr": integer, "values_ptr": integer, "sources_ptr": "*i64", "targets_ptr": "*i64"}
    # A pool may have more than 2^31 elements in a layer.
    signature |= {"layer_elements": "i64", "page_elements": "i32"}
    return AotCase(name, _copy_pages, signature, {"BLOCK": sizes.block}, list(signature), sizes.num_warps)


FRAME = 1560 * 12 * 128
"""Elements of a frame of Wan2.1-1.3B at 480x832."""


def aot_cases(target: str) -> list[AotCase]:
    """Return the same cases for every target."""
    return [_aot_case("copy_pages.bf16", 2, FRAME), _aot_case("copy_pages.fp32", 4, FRAME)]
