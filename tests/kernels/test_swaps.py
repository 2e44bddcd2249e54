"""The README's swap guides against the models they go into: the code under test is the README's.

diffusers' model is the installed one. The Self-Forcing-style model is written here: its cache of dicts, its window that rolls past a sink.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import arcopo_kernels
import pytest
import torch
import torch.nn.functional as F
from arcopo_kernels import PagePool, dispatch
from arcopo_kernels.paging import pool as paging_pool
from arcopo_kernels.qk_norm_rope import qk_norm_rope
from arcopo_kernels.testing import assert_close, assert_no_worse
from torch import Tensor, nn

from .test_readme import run

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="triton is not installed")


def assert_same(name: str, actual: Tensor, expected: Tensor, tolerance: float = 5e-6) -> None:
    """The largest error over the largest value."""
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"{name}: largest error {error:.3g} of the largest value, allowed {tolerance:.3g}"


# diffusers

LATENTS, TEXT = (2, 4, 3, 4, 8), (2, 7, 24)  # a grid of 3, 2 and 4 tokens


def tiny_wan(**more: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 48, "freq_dim": 32}
    model = diffusers.WanTransformer3DModel(**{**sizes, **more}, in_channels=4, out_channels=4, text_dim=TEXT[-1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones and zeros would hide which is which
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    latents, text = (torch.randn(shape, device=device) for shape in (LATENTS, TEXT))
    return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.rand(LATENTS[0], device=device) * 1000}


def differentiated(model: nn.Module, arguments: dict[str, Tensor], grad_out: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of latents, text and every parameter that is used."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("hidden_states", "encoder_hidden_states")}
    (out,) = model(**{**arguments, **leaves}, return_dict=False)
    leaves |= {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True)
    return {"output": out.detach(), **{name: grad for name, grad in zip(leaves, grads) if grad is not None}}


def assert_swapped(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert_same("output", actual["output"], expected["output"])
    for name in actual:
        assert_close(name, actual[name], expected[name], 2e-5)  # the bias of a key nearly cancels out of the softmax: 6e-6 was seen


@pytest.mark.parametrize("variant", ["plain", "fused", "checkpointed", "adapter"])
def test_diffusers_in_float32(variant: str) -> None:
    diffusers, model, arguments = pytest.importorskip("diffusers"), tiny_wan(), inputs()
    if variant == "fused":
        model.fuse_qkv_projections()
    if variant == "checkpointed":
        model.enable_gradient_checkpointing()
        model.train()
    if variant == "adapter":
        lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        model.add_adapter(lora)
    grad_out = torch.randn(LATENTS)
    expected = differentiated(model, arguments, grad_out)
    hook = run("FusedWanAttnProcessor")["swap_in"](model)
    dispatch._used.clear()
    actual = differentiated(model, arguments, grad_out)
    assert_swapped(actual, expected)
    assert dispatch.used("segment_attention"), "it was diffusers' own computation"

    hook.remove()
    model.set_attn_processor(diffusers.models.transformers.transformer_wan.WanAttnProcessor())
    dispatch._used.clear()
    assert torch.equal(differentiated(model, arguments, grad_out)["output"], expected["output"])
    assert dispatch.used("segment_attention") is None


def test_diffusers_in_bfloat16(tmp_path: Path) -> None:
    """Loaded as users load it: what diffusers keeps in float32 stays there. The weights are the same numbers in float32."""
    original = tiny_wan()
    original.save_pretrained(tmp_path)
    model, exact = (type(original).from_pretrained(tmp_path, torch_dtype=torch.bfloat16) for _ in range(2))
    arguments = {name: x if name == "timestep" else x.bfloat16() for name, x in inputs().items()}
    grad_out = torch.randn(LATENTS).bfloat16()
    expected = differentiated(exact.float(), {name: x.float() for name, x in arguments.items()}, grad_out.float())
    theirs = differentiated(model, arguments, grad_out)
    run("FusedWanAttnProcessor")["swap_in"](model)
    ours = differentiated(model, arguments, grad_out)
    for name in ("output", "hidden_states", "encoder_hidden_states"):
        assert ours[name].dtype == torch.bfloat16
        assert_no_worse(name, ours[name], theirs[name], expected[name])


@needs_triton
def test_diffusers_with_the_kernels(device: torch.device) -> None:
    model, arguments = tiny_wan(num_layers=1).to(device), inputs(device)
    grad_out = torch.randn(LATENTS, device=device)
    expected = differentiated(model, arguments, grad_out)
    run("FusedWanAttnProcessor")["swap_in"](model)
    with arcopo_kernels.use("triton"):
        actual = differentiated(model, arguments, grad_out)
    assert all(dispatch.used(name).name == "triton" for name in ("qk_norm_rope", "rms_norm", "segment_attention"))
    assert_swapped(actual, expected)


def test_diffusers_image_to_video_is_refused() -> None:
    model, arguments = tiny_wan(image_dim=8, added_kv_proj_dim=32), inputs()
    run("FusedWanAttnProcessor")["swap_in"](model)
    with pytest.raises(ValueError, match="added_kv_proj_dim"):
        model(**arguments)


# A Self-Forcing-style model

HEADS, HEAD_DIM, ROWS, COLUMNS, LAYERS = 2, 16, 2, 3, 2
FRAME, DIM = ROWS * COLUMNS, HEADS * HEAD_DIM


class Layer(nn.Module):
    """Self-attention of one block, residual included; the attention itself is handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = (nn.Parameter(1 + 0.3 * torch.randn(DIM)) for _ in range(2))

    def heads(self, x: Tensor) -> list[Tensor]:
        return [projection(x).unflatten(-1, (HEADS, HEAD_DIM)) for projection in (self.q, self.k, self.v)]


def rms_norm_rope(x: Tensor, weight: Tensor, position: int) -> Tensor:
    """Norm over all heads, then 3-axis RoPE of adjacent pairs as complex128 numbers: time, row, column."""
    x = (x.flatten(2) * (x.flatten(2).square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).view(x.shape)
    frames, spatial = x.shape[1] // FRAME, HEAD_DIM // 6
    places = torch.cartesian_prod(torch.arange(position, position + frames), torch.arange(ROWS), torch.arange(COLUMNS))
    axes = (HEAD_DIM // 2 - 2 * spatial, spatial, spatial)
    angles = [place[:, None] * 10000.0 ** (-torch.arange(n).double() / n) for place, n in zip(places.double().unbind(-1), axes)]
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, dim=-1)).to(x.device).unsqueeze(1)  # [T, 1, D / 2]
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2).to(x.dtype)


def dict_caches(batch: int, frames: int) -> list[dict[str, Tensor]]:
    """Space for `frames` frames in each layer: the window, or the whole video."""

    def empty() -> dict[str, Tensor]:
        tensors = {name: torch.zeros(batch, frames * FRAME, HEADS, HEAD_DIM) for name in ("k", "v")}
        return tensors | {name: torch.zeros(1, dtype=torch.int64) for name in ("global_end_index", "local_end_index")}

    return [empty() for _ in range(LAYERS)]


def dict_attention(q: Tensor, k: Tensor, v: Tensor, cache: dict[str, Tensor], start: int, windowed: bool, sink: int) -> Tensor:
    """Cache the chunk that starts at token `start`, then attend to what is cached: the chunk itself, and what the window holds."""
    new, size, local = k.shape[1], cache["k"].shape[1], int(cache["local_end_index"])
    ahead = start + new - int(cache["global_end_index"])  # 0 where a later pass overwrites the chunk
    if windowed and ahead > 0 and local + new > size:
        evicted = local + new - size
        for name in ("k", "v"):
            cache[name][:, sink : local - evicted] = cache[name][:, sink + evicted : local].clone()
        local -= evicted
    local += ahead
    for name, x in (("k", k), ("v", v)):
        cache[name][:, local - new : local] = x
    cache["global_end_index"].fill_(start + new)
    cache["local_end_index"].fill_(local)
    key, value = (cache[name][:, :local].transpose(1, 2) for name in ("k", "v"))
    return F.scaled_dot_product_attention(q.transpose(1, 2), key, value).transpose(1, 2)


def dict_model(x: Tensor, layers: Sequence[Layer], caches: list[dict[str, Tensor]], frame: int, windowed: bool, sink: int) -> Tensor:
    """One pass over a chunk [B, T, E] whose first latent frame is `frame`."""
    for layer, cache in zip(layers, caches):
        q, k, v = layer.heads(x)
        q, k = rms_norm_rope(q, layer.norm_q, frame), rms_norm_rope(k, layer.norm_k, frame)
        x = x + layer.o(dict_attention(q, k, v, cache, frame * FRAME, windowed, sink * FRAME).flatten(2))
    return x


def paged_model(x: Tensor, layers: Sequence[Layer], cache: Any, frame: int, store: bool = True) -> Tensor:
    """The same, swapped."""
    frames = x.shape[1] // FRAME
    cache.begin(frame, frames, store)
    for index, layer in enumerate(layers):
        q, k, v = layer.heads(x)
        q, k = qk_norm_rope(q, k, layer.norm_q, layer.norm_k, grid=(frames, ROWS, COLUMNS), position=frame)
        x = x + layer.o(cache.attend(index, q, k, v).flatten(2))
    return x


@pytest.fixture
def layers() -> nn.ModuleList:
    return nn.ModuleList(Layer() for _ in range(LAYERS))


def paged_cache(pages: int, batch: int, window: int | None, sink: int, device: torch.device | str = "cpu") -> Any:
    pool = PagePool(layers=LAYERS, pages=pages, tokens_per_page=FRAME, heads=HEADS, head_dim=HEAD_DIM, device=device)
    pool.keys.fill_(torch.nan)  # what was never written must not be seen
    pool.values.fill_(torch.nan)
    return run("PagedCache")["PagedCache"](pool, [pool.table() for _ in range(batch)], window, sink)


def passes(batch: int, chunk: int, first: int, stop: int, steps: int = 3) -> Iterator[tuple[int, bool, Tensor]]:
    """Every pass over the chunks of frames [first, stop): the first frame, whether it is the clean pass, the last one, and its input."""
    for frame in range(first, stop, chunk):
        for step in range(steps):
            yield frame, step == steps - 1, torch.randn(batch, chunk * FRAME, DIM)


# Chunk, window, sink: the whole video; a window of two chunks, of a sink and two, of a sink and one, of no whole number; frame by frame.
WINDOWS = [(2, None, 0), (2, 4, 0), (2, 5, 1), (2, 4, 2), (3, 5, 1), (1, 4, 2)]


@pytest.mark.parametrize("store", ["every pass", "the clean pass"])
@pytest.mark.parametrize("chunk,window,sink", WINDOWS)
@torch.no_grad()
def test_self_forcing(layers: nn.ModuleList, chunk: int, window: int | None, sink: int, store: str) -> None:
    batch, frames = 2, 6 * chunk
    caches = dict_caches(batch, window or frames)
    # A pool of just what is visible will do: the window slides before pages are taken.
    cache = paged_cache(batch * (window or frames), batch, window, sink)
    for frame, clean, x in passes(batch, chunk, 0, frames):
        expected = dict_model(x, layers, caches, frame, window is not None, sink)
        actual = paged_model(x, layers, cache, frame, clean or store == "every pass")
        assert_same(f"frame {frame}", actual, expected, 1e-5)
    assert len(cache.tables[0]) == min(frames, window or frames)


@needs_triton
@torch.no_grad()
def test_self_forcing_with_the_kernels(layers: nn.ModuleList, device: torch.device) -> None:
    caches, cache = dict_caches(2, 5), paged_cache(10, 2, 5, 1, device)
    ours = deepcopy(layers).to(device)
    for frame, _, x in passes(2, 2, 0, 6, steps=1):
        expected = dict_model(x, layers, caches, frame, True, 1)
        with arcopo_kernels.use("triton"):
            actual = paged_model(x.to(device), ours, cache, frame)
        assert_same(f"frame {frame}", actual.cpu(), expected, 1e-5)
    assert all(dispatch.used(name).name == "triton" for name in ("qk_norm_rope", "segment_attention"))


@pytest.mark.parametrize("window,sink", [(None, 0), (5, 1)])
@torch.no_grad()
def test_self_forcing_branches(layers: nn.ModuleList, monkeypatch: pytest.MonkeyPatch, window: int | None, sink: int) -> None:
    """A fork is a list; each branch goes on as a copy of the dicts would, and the video it came from as if there were none."""
    chunk, fork, frames, branches = 2, 6, 12, 3
    caches, cache = dict_caches(1, window or frames), paged_cache(60, 1, window, sink)
    for frame, _, x in passes(1, chunk, 0, fork):
        dict_model(x, layers, caches, frame, window is not None, sink)
        paged_model(x, layers, cache, frame)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a page was copied")

    monkeypatch.setattr(paging_pool, "copy_pages", refuse)
    pool, held = cache.pool, cache.pool.pages_in_use
    before = deepcopy((pool.keys, pool.values))
    branch_caches, forked = [deepcopy(caches) for _ in range(branches)], cache.fork(branches)
    assert pool.pages_in_use == held == min(fork, window or fork)
    for store, kept in zip((pool.keys, pool.values), before):
        assert torch.equal(store.view(torch.int32), kept.view(torch.int32))  # NaN and all
    own = passes(1, chunk, fork, frames)
    for frame, clean, x in passes(branches, chunk, fork, frames):
        expected = [dict_model(x[i : i + 1], layers, theirs, frame, window is not None, sink) for i, theirs in enumerate(branch_caches)]
        assert_same(f"branches, frame {frame}", paged_model(x, layers, forked, frame, clean), torch.cat(expected), 1e-5)
        _, _, x = next(own)
        expected = dict_model(x, layers, caches, frame, window is not None, sink)
        assert_same(f"the video itself, frame {frame}", paged_model(x, layers, cache, frame), expected, 1e-5)
    shared, own_each = (fork, frames - fork) if window is None else (sink, window - sink)
    assert pool.pages_in_use == shared + (1 + branches) * own_each
    for table in (*cache.tables, *forked.tables):
        table.release()
    assert pool.pages_in_use == 0


@torch.no_grad()
def test_self_forcing_again_from_an_earlier_chunk(layers: nn.ModuleList) -> None:
    """A pass over an earlier chunk forgets what came after it, as the indices do, whether the pass itself is cached or not."""
    caches, cache = dict_caches(1, 8), paged_cache(8, 1, None, 0)
    for first in (0, 2, 4):
        for frame, clean, x in passes(1, 2, first, 8):
            expected = dict_model(x, layers, caches, frame, False, 0)
            assert_same(f"from {first}, frame {frame}", paged_model(x, layers, cache, frame, clean or first == 2), expected, 1e-5)
    with pytest.raises(ValueError, match="columns"):
        cache.begin(10, 2)  # frames 8 and 9 are missing


def test_gradient_through_a_self_forcing_chunk(layers: nn.ModuleList) -> None:
    """Of the chunk's input and of the weights, with what was cached before as constants."""
    caches, cache = dict_caches(2, 6), paged_cache(12, 2, None, 0)
    with torch.no_grad():
        for frame, _, x in passes(2, 2, 0, 4, steps=1):
            dict_model(x, layers, caches, frame, False, 0)
            paged_model(x, layers, cache, frame)
    x, grad_out = torch.randn(2, 2, 2 * FRAME, DIM)
    leaves = {"x": x.requires_grad_(), **dict(layers.named_parameters())}
    expected = torch.autograd.grad(dict_model(x, layers, caches, 4, False, 0), list(leaves.values()), grad_out)
    actual = torch.autograd.grad(paged_model(x, layers, cache, 4, store=False), list(leaves.values()), grad_out)
    for name, ours, theirs in zip(leaves, actual, expected):
        assert_close(name, ours, theirs, 1e-5)
    with pytest.raises(ValueError, match="gradient"):
        paged_model(x, layers, cache, 4)


# A plain nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_linear_against_peft(dtype: torch.dtype) -> None:
    """Output, gradients of the input and of the adapter, in a model that knows nothing of adapters; all else is frozen."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(approximate="tanh"), nn.ModuleDict({"last": nn.Linear(40, 16)})["last"]).to(dtype)
    theirs, exact = deepcopy(model), deepcopy(model).double()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    for other in (theirs, exact):
        peft.inject_adapter_in_model(config, other)
        other.to(next(other.parameters()).dtype)
    parameters = run("LoRALinear")["swap_in"](model, ["0", "2"], rank=4, alpha=6)
    assert [parameter.shape for parameter in parameters] == [(4, 24), (40, 4), (4, 40), (16, 4)]
    assert all(parameter.dtype == torch.float32 for parameter in parameters) and (parameters[1] == 0).all()
    with torch.no_grad():
        for name, ours in (("0", model[0]), ("2", model[2])):
            for letter in "AB":
                source = getattr(ours, f"lora_{letter}").normal_(std=0.3).to(dtype)
                getattr(ours, f"lora_{letter}").copy_(source)
                for other in (theirs, exact):
                    other.get_submodule(f"{name}.lora_{letter}.default").weight.copy_(source)
    x, grad_out = torch.randn(50, 24).to(dtype), torch.randn(50, 16).to(dtype)

    def differentiated(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        out = model(leaf)
        return [out, *torch.autograd.grad(out, [leaf, *(p for p in model.parameters() if p.requires_grad)], grad_out.to(dtype))]

    results = zip(differentiated(model, dtype), differentiated(theirs, dtype), differentiated(exact, torch.float64))
    for name, (ours, others, right) in zip(("output", "x", "A", "B", "second A", "second B"), results):
        if dtype == torch.float32:
            assert_close(name, ours, others, 1e-5)
        assert_no_worse(name, ours, others, right)


@needs_triton
def test_a_plain_linear_with_the_kernels(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(24, 40)).to(device)
    plain, x = deepcopy(model), torch.randn(50, 24, device=device)
    down, up = run("LoRALinear")["swap_in"](model, ["0"], rank=4, alpha=6)
    nn.init.normal_(up)
    with arcopo_kernels.use("triton"):
        out = model(x)
    assert dispatch.used("lora_linear").name == "triton"
    assert_close("output", out, plain(x) + 1.5 * x @ (up @ down).T, 1e-5)
