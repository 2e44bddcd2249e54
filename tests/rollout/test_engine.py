"""The rollout engine: forked branches are what independent rollouts would be, replay is what rollout was, and no page is lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from arcopo_kernels import PagePoolExhausted
from support.krea import StandIn
from support.models import SAMPLER, SHAPE, random_text, small_engine, small_model
from torch import Tensor

from arcopo_fast.config.sections import CacheConfig
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.rollout.cache import VARIANTS, pages_for, plan_pages, variant_of
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Samples
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan, NoiseSource
from arcopo_fast.rollout.stream import VideoShape

GROUP = 6
POLICIES = {
    "global": CacheConfig(),
    "window": CacheConfig(window=4),
    "window and sink": CacheConfig(window=5, sink=1),
    "longlive": CacheConfig(variant="longlive", window=6, sink=2),
    "longlive infinity": CacheConfig(variant="longlive_infinity", window=6, sink=2),
    "infinity rope": CacheConfig(variant="infinity_rope", window=4, sink=1),
    "krea": CacheConfig(variant="krea", window=4),
    "krea, first frame kept": CacheConfig(variant="krea", window=5, sink=1),
}


def test_every_variant_has_a_class() -> None:
    assert list(VARIANTS) == list(get_args(CacheConfig.model_fields["variant"].annotation))
    assert {policy.variant for policy in POLICIES.values()} == {*VARIANTS}, "and is among those that are tested here"


@dataclass
class WithPivot:
    """One branch's noise, as a source of its own: the shared draws, but its own initial noise at the pivot."""

    shared: NoiseSource
    pivot: int
    own: Tensor

    def initial(self, chunk: int) -> Tensor:
        return self.own if chunk == self.pivot else self.shared.initial(chunk)

    def renoise(self, chunk: int, step: int) -> Tensor:
        return self.shared.renoise(chunk, step)


def policy_engine(model: CausalWan, policy: CacheConfig, pages: int | None = None) -> Engine:
    return Engine(model, SHAPE, SAMPLER, policy, pages=pages or pages_for(CacheConfig(), SHAPE.chunk_frames, GROUP), reencoder=StandIn())


def keyed() -> KeyedNoise:
    return KeyedNoise(SHAPE, GroupId(seed=int(torch.randint(10**6, ())), iteration=3, group=1))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("pivot", range(SHAPE.chunks))
def test_branches_equal_independent_rollouts(policy: CacheConfig, pivot: int, dtype: torch.dtype, tolerance: float) -> None:
    engine, text, noise = policy_engine(small_model(dtype), policy), random_text(), keyed()
    with engine.rollout(text, noise.id, pivot=pivot, members=GROUP, plan=NoisePlan(0.5)) as group:
        branches = group.videos()
    initial = noise.neighbors(pivot, range(GROUP), 0.5)
    alone = policy_engine(engine.model, policy)
    for branch in range(GROUP):
        latents = alone.generate(text, WithPivot(noise, pivot, initial[branch : branch + 1]))
        torch.testing.assert_close(branches[branch : branch + 1], latents, rtol=0, atol=tolerance)
    assert (branches[0] - branches[1]).abs().max() > 1e-2, "branches must differ"
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("pivot", range(SHAPE.chunks))
def test_pages_are_prefix_plus_tails_and_the_parent_is_untouched(pivot: int) -> None:
    engine, text, noise = small_engine(small_model()), random_text(), keyed()
    prefix_only = engine.rebuild_prefix(text, torch.empty(1, 0, *SHAPE.chunk(0)[1:]))
    for chunk in range(pivot):
        engine.extend(prefix_only, chunk, noise.initial(chunk), noise, last=False)
    expected = [engine.pool.read(0, run)[0].clone() for run in engine.pool.runs(prefix_only.cache.tables)]
    prefix_only.cache.release()
    engine.pool.peak_in_use = 0
    group = engine.rollout(text, noise.id, pivot=pivot, members=GROUP, plan=NoisePlan(0.5))
    prefix = 2 * pivot
    planned = plan_pages(CacheConfig(), SHAPE.chunk_frames, pivot, GROUP).pages
    assert engine.pool.peak_in_use == max(prefix + GROUP * (6 - prefix), prefix) == max(planned, prefix)
    assert engine.pool.pages_in_use == prefix, "the tails are gone, the prefix stays for replay"
    for run, before in zip(engine.pool.runs(group.prefix.cache.tables), expected):
        assert torch.equal(engine.pool.read(0, run)[0], before)
    group.release()
    assert engine.pool.pages_in_use == 0


def test_waves_give_the_same_group() -> None:
    engine, text, noise = small_engine(small_model()), random_text(), keyed()
    with engine.rollout(text, noise.id, pivot=1, members=GROUP, plan=NoisePlan(0.5)) as whole:
        pass
    engine.pool.peak_in_use = 0
    with engine.rollout(text, noise.id, pivot=1, members=GROUP, plan=NoisePlan(0.5), branches_per_wave=4) as waves:
        assert engine.pool.peak_in_use == 2 + 4 * 4
    torch.testing.assert_close(waves.predictions, whole.predictions, rtol=0, atol=1e-5)
    torch.testing.assert_close(waves.videos(), whole.videos(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES.values() if policy.window], ids=[*POLICIES][1:])
def test_a_windowed_group_runs_in_the_pages_planned_for_it(policy: CacheConfig) -> None:
    pages = pages_for(policy, SHAPE.chunk_frames, GROUP)
    assert pages <= pages_for(CacheConfig(), SHAPE.chunk_frames, GROUP)
    engine = policy_engine(small_model(), policy, pages)
    for pivot in range(SHAPE.chunks):
        engine.pool.peak_in_use = 0
        with engine.rollout(random_text(), keyed().id, pivot=pivot, members=GROUP, plan=NoisePlan(0.5)):
            assert engine.pool.peak_in_use == plan_pages(policy, SHAPE.chunk_frames, pivot, GROUP).pages
        assert engine.pool.pages_in_use == 0


def test_a_failed_rollout_gives_its_pages_back() -> None:
    engine = small_engine(small_model(), branches=2)
    with pytest.raises(PagePoolExhausted):
        engine.rollout(random_text(), keyed().id, pivot=1, members=GROUP, plan=NoisePlan(0.5))
    assert engine.pool.pages_in_use == 0
    with pytest.raises(ValueError, match="pivot 4 is not a chunk"):
        engine.rollout(random_text(), keyed().id, pivot=4, members=2, plan=NoisePlan(0.5))


def test_a_wave_that_runs_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, text, noise = small_engine(small_model()), random_text(), keyed()
    with engine.rollout(text, noise.id, pivot=1, members=GROUP, plan=NoisePlan(0.5)) as whole:
        pass
    forward, batches = engine.model.forward, []

    def scarce(x: Tensor, *args: object, **kwargs: object) -> Tensor | None:
        batches.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore lines")
        return forward(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.model, "forward", scarce)
    said = r"a wave of 6 branches ran out of memory \(CUDA out of memory. Tried to allocate 3.00 GiB.\); continuing with waves of 3"
    with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match="a wave of 3 branches"):
        group = engine.rollout(text, noise.id, pivot=1, members=GROUP, plan=NoisePlan(0.5))
    assert engine.pool.pages_in_use == 2
    group.release()
    torch.testing.assert_close(group.predictions, whole.predictions, rtol=0, atol=1e-5)
    torch.testing.assert_close(group.videos(), whole.videos(), rtol=0, atol=1e-5)
    batches.clear()
    with engine.rollout(text, noise.id, pivot=1, members=GROUP, plan=NoisePlan(0.5)):
        assert max(batches) == 2, "what ran out once is not tried again"
    monkeypatch.setattr(engine.model, "forward", lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("nothing fits")))
    engine.largest_wave = 1
    with pytest.raises(torch.OutOfMemoryError, match="nothing fits"):
        engine.rollout(text, noise.id, pivot=1, members=GROUP, plan=NoisePlan(0.5))
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("policy", [POLICIES["global"], POLICIES["longlive infinity"], POLICIES["krea"]], ids=["global", "unroped", "krea"])
def test_checkpointing_changes_no_gradient_and_keeps_less(policy: CacheConfig) -> None:
    engine = policy_engine(small_model(), policy)
    steps, anchors = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 5])
    with engine.rollout(random_text(), keyed().id, pivot=1, members=GROUP, plan=NoisePlan(0.5)) as group:
        engine.model.requires_grad_()
        results: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        kept: list[int] = []
        for checkpoint in (False, True):
            kept.append(0)

            def count(x: Tensor) -> Tensor:
                kept[-1] += x.numel()
                return x

            with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
                prediction = engine.predict(group, group.samples(steps, anchors), checkpoint=checkpoint)
            loss = (prediction * torch.linspace(-1, 1, prediction.numel()).view_as(prediction)).sum()
            results.append((prediction, torch.autograd.grad(loss, list(engine.model.parameters()), allow_unused=True)))
    (prediction, gradients), (checkpointed, again) = results
    assert torch.equal(prediction, checkpointed)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, again))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("pivot", [0, 2, 3])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_equals_rollout_bit_for_bit(pivot: int, policy: CacheConfig, dtype: torch.dtype) -> None:
    engine = policy_engine(small_model(dtype), policy)
    with engine.rollout(random_text(), keyed().id, pivot=pivot, members=GROUP, plan=NoisePlan(0.5)) as group:
        for step in range(len(group.steps)):
            everyone = torch.arange(GROUP)
            replayed = engine.predict(group, group.samples(torch.full((GROUP,), step), everyone))
            assert replayed.requires_grad and torch.equal(replayed, group.predictions[step])
        assert engine.pool.pages_in_use == group.prefix.cache.frames, "replay keeps no page"


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_rebuilt_prefix_equals_the_rollouts_bit_for_bit(policy: CacheConfig) -> None:
    engine = policy_engine(small_model(), policy)
    with engine.rollout(random_text(), keyed().id, pivot=3, members=2, plan=NoisePlan(0.5)) as group:
        rebuilt = engine.rebuild_prefix(group.text, group.prefix_latents)
        for layer in range(2):
            for which in range(2):
                ours, theirs = (
                    torch.cat([engine.pool.read(layer, run)[which] for run in engine.pool.runs(stream.cache.tables)], dim=1)
                    for stream in (rebuilt, group.prefix)
                )
                assert torch.equal(ours, theirs)
        rebuilt.cache.release()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_later_chunk_is_predicted_in_its_members_own_context(policy: CacheConfig) -> None:
    """It is the context of the member's whole video, made by clean passes; nothing of it is kept."""
    engine = policy_engine(small_model(torch.float64), policy)
    with engine.rollout(random_text(), keyed().id, pivot=1, members=3, plan=NoisePlan(0.5)) as group:
        for chunk, clean in group.own_chunks(SHAPE.chunk_frames).items():
            samples = Samples.noised(chunk, clean, torch.randn_like(clean), group.steps, torch.tensor([0, 1, 1]))
            with torch.no_grad():
                predicted = engine.predict(group, samples)
                assert engine.pool.pages_in_use == group.prefix.cache.frames
                for member in range(3):
                    own = group.videos()[member : member + 1, : sum(SHAPE.chunk_frames[:chunk])]
                    stream = engine.rebuild_prefix(group.text, own)
                    alone = engine.predict(group, samples.split(1)[member], context=stream)
                    stream.cache.release()
                    torch.testing.assert_close(predicted[member : member + 1], alone, rtol=0, atol=1e-5)
            assert (predicted[0] - predicted[1]).abs().max() > 1e-2


def test_gradient_stays_in_the_pivot_chunk() -> None:
    engine = small_engine(small_model())
    with engine.rollout(random_text(), keyed().id, pivot=2, members=3, plan=NoisePlan(0.5)) as group:
        assert not engine.pool.keys.requires_grad
        latents = [chunk.latents.requires_grad_() for chunk in group.history.chunks]
        inputs = group.inputs.requires_grad_()
        out = engine.predict(group, group.samples(torch.tensor([1, 0]), torch.tensor([2, 0]))).sum()
        *through_prefix, through_pivot = torch.autograd.grad(out, [*latents, inputs], allow_unused=True)
        assert through_prefix == [None] * 2 and through_pivot is not None
        engine.pool.keys.requires_grad_()
        with pytest.raises(ValueError, match="constants"):
            engine.predict(group, group.samples(torch.tensor([1]), torch.tensor([2])))
        engine.pool.keys.requires_grad_(False)


def test_the_flow_of_a_prompt_switch_after_the_fork() -> None:
    """Branches that switch prompts cache shared frames again, each for itself; the parent keeps its own."""
    engine, noise = small_engine(small_model(), cache=CacheConfig(variant="longlive", window=6, sink=2)), keyed()
    stream = engine.start(random_text())
    with torch.no_grad():
        for chunk in range(2):
            engine.extend(stream, chunk, noise.initial(chunk), noise, last=False)
        (run,) = engine.pool.runs(stream.cache.tables)
        before = engine.pool.read(1, run)[0].clone()
        branch = replace(stream, cache=stream.cache.fork(2), latents=list(stream.latents))
        engine.switch_prompt(branch, random_text())
        assert torch.equal(engine.pool.read(1, run)[0], before)
        assert engine.pool.pages_in_use == 4 + 2 * 4
        (own,) = engine.pool.runs(branch.cache.tables)
        assert (engine.pool.read(1, own)[0] - before).abs().max() > 1e-3
        stream.cache.release()
        branch.cache.release()
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("policy", [policy for policy in POLICIES.values() if policy.window], ids=[*POLICIES][1:])
def test_a_long_video_takes_no_more_than_its_window(policy: CacheConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and latents; and a prompt switch finds all the latents it caches again."""
    assert policy.window is not None
    shape, text, others = VideoShape((2,) * 30, 8, 4, 6), random_text(2), [random_text() for _ in range(2)]
    noise, switches = KeyedNoise(shape, GroupId(seed=int(torch.randint(10**6, ())))), {8: others[0], 51: others[1]}
    held = 2 * plan_pages(policy, shape.chunk_frames, shape.chunks - 1, 0).prefix
    assert held == 2 * (policy.window - 2 if variant_of(policy).recomputed else policy.window)
    engine = Engine(small_model(), shape, SAMPLER.model_copy(update={"steps": [1000]}), policy, pages=held, reencoder=StandIn())

    def video() -> tuple[list[Tensor], list[int]]:
        stream, chunks, kept = engine.start(text), [], []
        for trajectory in engine.stream(stream, noise, switches=switches):
            chunks.append(trajectory.predictions[-1])
            kept.append(sum(chunk.shape[1] for chunk in stream.latents))
        assert stream.frame == shape.frames
        stream.cache.release()
        return chunks, kept

    chunks, kept = video()
    assert engine.pool.peak_in_use == held
    assert max(kept) <= policy.window + 1 and min(kept[3:]) >= policy.window, "whole chunks, the window among them"
    monkeypatch.setattr(engine, "_forget", lambda stream: None)
    everything, kept = video()
    assert kept[-1] == shape.frames
    assert all(torch.equal(a, b) for a, b in zip(chunks, everything, strict=True))


def test_ode_rollouts_draw_no_noise() -> None:
    class Silent(KeyedNoise):
        def renoise(self, chunk: int, step: int) -> Tensor:
            raise AssertionError("an ODE step asked for noise")

    engine = small_engine(small_model(), sampler=SAMPLER.model_copy(update={"kind": "ode"}))
    latents = engine.generate(random_text(2), Silent(SHAPE, GroupId(seed=5)))
    assert latents.shape == (2, *(SHAPE.frames, 8, 4, 6)) and latents.isfinite().all()


@pytest.mark.parametrize("videos", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_noise_that_videos_share_is_pinned_once(videos: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU noise goes through pinned memory, where a tensor is copied with the strides it has: no two rows may be one."""

    def pin(tensor: Tensor) -> Tensor:
        pinned = torch.empty_strided(tensor.shape, tensor.stride())
        return pinned.copy_(tensor)  # which PyTorch refuses for an expanded tensor, as the real one does

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, non_blocking: tensor.clone())
    on_a_gpu = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda")))
    noise = torch.randn(1 if shared else videos, *SHAPE.chunk(0)).expand(videos, *SHAPE.chunk(0))
    assert torch.equal(Engine._on_device(on_a_gpu, noise), noise)  # type: ignore[arg-type]
