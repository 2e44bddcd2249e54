"""The copy of pages: the kernel copies bits, a write to shared pages is one launch, and the host never waits."""

from __future__ import annotations

import pytest
import torch
from arcopo_kernels import dispatch
from arcopo_kernels.paging import copy_pages
from support.pages import DIM, HEADS, LAYERS, TOKENS, append, make
from torch import Tensor

# The copy of pages


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Any bits at all, those of NaN included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integer)
    return torch.randint(info.min, info.max, shape, dtype=integer, device=device).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture
def triton_device(device: torch.device) -> torch.device:
    pytest.importorskip("triton")
    return device


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, block",
    [((3, 7, 5, 3, 7), 128), ((3, 7, 5, 3, 7), 32), ((2, 6, 4, 2, 16), 128), ((1, 2, 1, 1, 1), 1)],
    ids=["one tile", "four tiles", "whole tile", "one element"],
)
def test_the_kernel_copies_bits(triton_device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], block: int) -> None:
    from arcopo_kernels.paging import reference
    from arcopo_kernels.paging import triton as kernels

    keys, values = (random_bits(shape, dtype, triton_device) for _ in range(2))
    order = torch.randperm(shape[1], device=triton_device)
    targets = order[: shape[1] // 2]
    sources = order[shape[1] // 2 :][torch.randint(shape[1] - len(targets), (len(targets),), device=triton_device)]
    expected = [keys.clone(), values.clone()]
    reference.copy_pages(*(tensor.view(kernels.INTEGERS[dtype.itemsize]) for tensor in expected), sources, targets)
    kernels.copy_pages(keys, values, sources, targets, kernels.BlockSizes(block, num_warps=4))
    for name, ours, theirs in zip(("keys", "values"), (keys, values), expected):
        assert torch.equal(bits(ours), bits(theirs)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copy_on_write_is_one_launch(triton_device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers, keys and values; and the pool reads the same after it as after plain PyTorch's copy."""
    from arcopo_kernels.paging import triton as kernels

    launches, kernel = [], kernels._copy_pages

    class Counting:
        def __getitem__(self, grid: tuple[int, int]) -> object:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "_copy_pages", Counting())
    pool = make(9, dtype=dtype, device=triton_device)
    table = pool.table()
    table.extend(pool.allocate(3))
    bits(pool.keys).random_()
    bits(pool.values).random_()
    before = [bits(store[:, :3]).clone() for store in (pool.keys, pool.values)]
    branches = [table.fork() for _ in range(2)]
    with dispatch.use("triton"):
        pool.prepare_write(branches, 0, 3)
    assert launches == [(6, LAYERS)]
    assert [branch.pages for branch in branches] == [(3, 4, 5), (6, 7, 8)]
    for store, copied in zip((pool.keys, pool.values), before):
        for first in (0, 3, 6):
            assert torch.equal(bits(store[:, first : first + 3]), copied)


def pages_and_copies(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys, values = torch.randn(2, 2, 5, 3, 2, 4, device=device)
    return keys, values, torch.tensor([4, 0], device=device), torch.tensor([1, 2], device=device)


def test_the_operator_is_registered_as_it_behaves(triton_device: torch.device) -> None:
    torch.library.opcheck(torch.ops.arcopo.copy_pages.default, pages_and_copies(triton_device))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_the_copy_compiles_whole(triton_device: torch.device, implementation: str) -> None:
    keys, values, sources, targets = pages_and_copies(triton_device)
    expected = [keys.clone(), values.clone()]
    for store in expected:
        store[:, targets] = store[:, sources]
    with dispatch.use(implementation):
        copy_pages(keys.clone(), values.clone(), sources, targets)
        assert dispatch.used("copy_pages").name == implementation
        torch.compile(copy_pages, fullgraph=True, backend="aot_eager")(keys, values, sources, targets)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_what_does_not_fit_is_named() -> None:
    keys, values, sources, targets = pages_and_copies(torch.device("cpu"))
    for arguments, message in (
        ((keys[0, 0, 0, 0], values, sources, targets), r"keys has shape \[4\]; expected \[layers, pages, ...\]"),
        ((keys, values[:, 1:], sources, targets), r"values is \[2, 4, 3, 2, 4\] .*; expected what keys is, \[2, 5, 3, 2, 4\]"),
        ((keys, values.double(), sources, targets), "values is .* torch.float64"),
        ((keys, values, sources.int(), targets), r"sources is \[2\] torch.int32 on cpu; expected \[2\] torch.int64 on cpu"),
        ((keys, values, sources, targets[:1]), r"targets is \[1\] torch.int64 on cpu; expected \[2\] torch.int64"),
        ((keys.clone().requires_grad_(), values, sources, targets), "must not require gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            copy_pages(*arguments)


def test_storage_that_is_not_contiguous_takes_the_reference(triton_device: torch.device) -> None:
    keys, values, sources, targets = pages_and_copies(triton_device)
    expected = keys.clone()
    expected[:, targets] = expected[:, sources]
    keys = keys.transpose(3, 4).contiguous().transpose(3, 4)
    copy_pages(keys, values, sources, targets)
    assert torch.equal(keys, expected)
    with dispatch.use("triton"), pytest.raises(ValueError, match="not contiguous"):
        copy_pages(keys, values, sources, targets)


@pytest.mark.gpu
def test_a_captured_copy_takes_its_pages_from_the_device() -> None:
    keys, values, sources, targets = pages_and_copies(torch.device("cuda"))
    copy_pages(keys.clone(), values.clone(), sources, targets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy_pages(keys, values, sources, targets)
    for pages in ([3, 2], [0, 1]), ([1, 1], [4, 0]):
        sources.copy_(torch.tensor(pages[0]))
        targets.copy_(torch.tensor(pages[1]))
        expected = [keys.clone(), values.clone()]
        for store in expected:
            store[:, targets] = store[:, sources]
        graph.replay()
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


@pytest.mark.gpu
def test_the_host_never_waits_for_the_device() -> None:
    pool = make(16, device="cuda")
    table = pool.table()
    append(pool, [table], 3)
    key, value = torch.randn(2, 2, 3 * TOKENS, HEADS, DIM, device="cuda")
    branches = [table.fork() for _ in range(2)]
    warm = table.fork()
    pool.prepare_write([warm], 0, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = pool.prepare_write(branches, 0, 3)
        for layer in range(LAYERS):
            pool.write(layer, runs, key, value)
            for run in runs:
                pool.read(layer, run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found, written in zip(pool.read(1, pool.runs(branches)[0]), (key, value)):
        assert torch.equal(found, written)
