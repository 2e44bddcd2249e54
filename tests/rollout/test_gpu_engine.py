"""The engine on a GPU, between the toy's size and the real one's: it never waits while denoising, keeps to its plan of pages, and computes
what the plain PyTorch path of `benchmarks/reference/` computes. What of the first can be seen without a GPU is seen on the meta device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from arcopo_kernels import copo_surrogate
from arcopo_kernels.testing import assert_no_worse
from support.models import small_config, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arcopo_fast.build import build_engine
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.lora import BLOCK_TARGETS, adapter_parameters, add_lora
from arcopo_fast.rewards.simple import Sharpness, Steadiness
from arcopo_fast.rollout import graphs
from arcopo_fast.rollout.decode import decode_branches
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan
from arcopo_fast.rollout.stream import VideoShape
from benchmarks.full_size import FULL
from benchmarks.iteration import OurPath, Scene, changed, memory, problems
from benchmarks.reference.iteration import Reference

CUDA = torch.device("cuda")
SHAPE = VideoShape((3,) * 3, 16, 12, 20)
SIZES = small_config(
    num_layers=3, num_attention_heads=4, attention_head_dim=64, ffn_dim=512, text_dim=64, text_len=20, in_channels=16, out_channels=16
)
MIDDLE = changed(
    FULL,
    video={"chunks": 3, "latent_height": SHAPE.height, "latent_width": SHAPE.width},
    rollout={"group_size": 5},
    objective={"anchors_per_update": 2, "updates": 2},
    lora={"rank": 8, "alpha": 16.0},
)


def scene_of(dtype: torch.dtype, device: torch.device = CUDA) -> Scene:
    wide = torch.promote_types(dtype, torch.float32)
    model = add_lora(small_model(dtype, **vars(SIZES)), rank=8, alpha=16, targets=BLOCK_TARGETS, seed=0, dtype=wide)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Scene("middle", MIDDLE, model.to(device), torch.randn(1, 20, 64, device=device), "")


def as_dtype(scene: Scene, dtype: torch.dtype) -> Scene:
    """The same weights, base and adapter, in another dtype."""
    other = scene.copy()
    other.model.to(dtype)
    return other


class SameDevice(TorchDispatchMode):
    """Fails on an operator whose tensors lie on several devices: that is a copy between host and device, and reading a number waits too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {tensor.device.type for tensor in tree_leaves((args, kwargs, out)) if isinstance(tensor, Tensor)}
        if len(devices) > 1:
            raise AssertionError(f"{func} copies between {' and '.join(sorted(devices))} while denoising")
        return out


def watched_rollout(engine: Engine, text: Tensor, monkeypatch: pytest.MonkeyPatch, watch: Any) -> int:
    """A rollout, `watch()` around each chunk's denoising; how many there were. What is made only once, as RoPE's tables are, is there."""
    noise, denoise, calls = KeyedNoise(SHAPE, GroupId(seed=1)), graphs.denoise, []
    engine.rollout(text, noise.id, pivot=1, members=3, plan=NoisePlan(0.5)).release()

    def watched(*args: Any, **more: Any) -> Any:
        calls.append(1)
        with watch():
            return denoise(*args, **more)

    monkeypatch.setattr(graphs, "denoise", watched)
    engine.rollout(text, noise.id, pivot=1, members=3, plan=NoisePlan(0.5)).release()
    return len(calls)


def engine_of(model: CausalWan) -> Engine:
    return build_engine(MIDDLE, model)


def test_denoising_copies_nothing_between_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(torch.bfloat16, **vars(SIZES)).to("meta")
    assert watched_rollout(engine_of(model), torch.randn(1, 20, 64), monkeypatch, SameDevice) == 3


def test_a_copy_between_devices_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = CausalWan.forward
    monkeypatch.setattr(CausalWan, "forward", lambda self, x, *rest, **more: forward(self, x + torch.zeros(1).to(x.device), *rest, **more))
    model = small_model(torch.bfloat16, **vars(SIZES)).to("meta")
    with pytest.raises(AssertionError, match="copies between cpu and meta while denoising"):
        watched_rollout(engine_of(model), torch.randn(1, 20, 64), monkeypatch, SameDevice)


class OnlyCopiesCross(SameDevice):
    """As `SameDevice`, but for what GPU code may do outside of the denoising: copies, numbers on the host as indices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.index):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_an_iteration_computes_on_one_device() -> None:
    """On the meta device, which takes operands from anywhere without a word: rollout, replay, gradient, step, decoding, rewards."""
    diffusers = pytest.importorskip("diffusers")
    meta = torch.device("meta")
    with meta:
        vae = diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    scene = scene_of(torch.float32, meta)
    scene.text = torch.randn(scene.text.shape)  # a prompt's embedding comes from the host
    path = OurPath(replace(scene, vae=vae), pivot=1)
    assert path.decoder is not None
    with OnlyCopiesCross(), path.rollout() as group:
        slices = decode_branches(path.decoder, group.prefix_latents, group.tails, 2)
        scores = [reward(frames, ["a boat"] * len(frames)) for frames in slices for reward in (Sharpness(), Steadiness())]
        items = path.objective.draw_items(group, 0)
        target = path.objective.target(group, torch.randn(5, dtype=torch.float64))
        new = path.engine.predict(group, group.samples(*items))
        steps = items.steps.to(meta)
        loss = copo_surrogate(new, new.detach(), target.candidates, target.advantages, steps).loss
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(path.parameters, 1.0)
        path.optimizer.step()
    assert {score.device.type for score in scores} == {p.grad.device.type for p in path.parameters if p.grad is not None} == {"meta"}
    assert all(p.grad is not None for p in path.parameters)


class NoWaiting:
    """PyTorch raises on every call that makes the host wait for the device."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_host_never_waits_while_denoising(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    scene = scene_of(dtype)
    assert watched_rollout(engine_of(scene.model), scene.text, monkeypatch, NoWaiting) == 3


@pytest.mark.gpu
def test_a_wait_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = CausalWan.forward
    monkeypatch.setattr(CausalWan, "forward", lambda self, x, *rest, **more: forward(self, x + 0 * x.sum().item(), *rest, **more))
    scene = scene_of(torch.bfloat16)
    with pytest.raises(RuntimeError, match="synchroniz"):
        watched_rollout(engine_of(scene.model), scene.text, monkeypatch, NoWaiting)


@pytest.mark.gpu
@pytest.mark.parametrize("pivot", [0, 1, 2])
def test_latents_are_those_of_plain_pytorch(pivot: int) -> None:
    """At most twice the error of plain PyTorch in bfloat16, both against plain PyTorch in float64."""
    half = scene_of(torch.bfloat16)
    exact = as_dtype(half, torch.float64)
    ours = OurPath(half, pivot)
    with torch.no_grad(), ours.engine.rollout(half.text, half.noise.id, pivot=pivot, members=5, plan=NoisePlan(0.5)) as group:
        latents = group.videos()
    same, reference = (Reference(scene.config, scene.model).rollout(scene.text, scene.noise, pivot) for scene in (half, exact))
    assert_no_worse("latents", latents, same.latents, reference.latents, factor=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("pivot", [0, 2])
def test_gradients_are_those_of_plain_pytorch(pivot: int) -> None:
    """One (step, anchor) pair from the same input: the gradient of every adapter against plain PyTorch in float64."""
    half = scene_of(torch.bfloat16)
    exact = as_dtype(half, torch.float64)
    ours = OurPath(half, pivot)
    paths = {name: Reference(scene.config, scene.copy().model) for name, scene in (("same", half), ("exact", exact))}
    with ours.engine.rollout(half.text, half.noise.id, pivot=pivot, members=5, plan=NoisePlan(0.5)) as group:
        weight = torch.randn_like(group.predictions[1, 3])
        (ours.engine.predict(group, group.samples(torch.tensor([1]), torch.tensor([3])))[0] * weight).sum().backward()
        for path in paths.values():
            candidates = path.rollout(half.text, half.noise, pivot, branches=1)
            candidates.inputs[1, 3] = group.inputs[1, 3].to(candidates.inputs.dtype)
            (path.replay(candidates, half.text, pivot, 1, 3)[0] * weight).sum().backward()
    everyone = (ours.parameters, paths["same"].parameters, paths["exact"].parameters)
    assert_no_worse("gradients", *(torch.cat([p.grad.flatten() for p in parameters]) for parameters in everyone), factor=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("pivot", [0, 1, 2])
def test_an_iteration_keeps_to_its_plan(pivot: int) -> None:
    path = OurPath(scene_of(torch.bfloat16), pivot)
    before = torch.cuda.memory_allocated()
    statistics = path.iteration().statistics
    figures = memory(path)
    assert not problems(path) and figures["pages"] == path.plan.pages
    assert figures["kv_bytes"] == figures["planned_kv_bytes"] <= before
    assert statistics["update1/ratio_max"] == 0, "before the first update the ratio is exactly 1"
    assert path.engine.pool.pages_in_use == 0
    if pivot == SHAPE.chunks - 1:
        assert path.plan.tail == 0, "a group that forks at the last chunk needs no branch pages"


@pytest.mark.gpu
def test_cuda_graphs_change_no_bit() -> None:
    scene = scene_of(torch.bfloat16)
    latents = []
    for mode in ("off", "on"):
        engine = build_engine(changed(MIDDLE, rollout={"cuda_graphs": mode}), scene.model)
        for _ in range(3):  # the second time a place is captured, the third it is replayed
            with engine.rollout(scene.text, scene.noise.id, pivot=1, members=5, plan=NoisePlan(0.5)) as group:
                latents.append(group.videos())
        if mode == "on":
            assert engine.graphs.reason is None
    assert all(torch.equal(latents[0], other) for other in latents[1:])
